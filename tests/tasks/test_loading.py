import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pellm_lightning.tasks import ClassificationDataModule, TextDataModule
from pellm_lightning.tasks.loading import Stream


class Recorder(LightningModule):
    """Keeps the first token of each sample that it is trained on, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.current_epoch, batch["input_ids"][:, 0].tolist()))
        return self.weight.sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """There is none, but there are loaders of held-out texts."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Texts:
    """23 texts of one word each, by which a sample is known."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        rows = [json.dumps({"text": f"w{i}", "label": i % 2}) for i in range(23)]
        (folder / "t.jsonl").write_text("\n".join(rows))
        self.file, self.tokenizer, self.folder = str(folder / "t.jsonl"), tokenizer, folder

    def stored(self) -> TextDataModule:
        return TextDataModule(self.file, self.tokenizer, 3, 2, ignore_columns=["label"], val_fraction=0.2)

    def by_worker(self) -> TextDataModule:
        data = self.stored()
        data.num_workers = 1
        return data

    def streamed(self) -> TextDataModule:
        return TextDataModule(
            self.file, self.tokenizer, 3, 2, ignore_columns=["label"], val_fraction=0, streaming=True
        )

    def labelled(self) -> ClassificationDataModule:
        return ClassificationDataModule(self.file, self.tokenizer, [0, 1], batch_size=3, val_fraction=0)

    def streamed_labels(self) -> ClassificationDataModule:
        options = {"batch_size": 3, "val_fraction": 0, "streaming": True}
        return ClassificationDataModule(self.file, self.tokenizer, [0, 1], **options)


@pytest.fixture
def quiet_trainer(quiet_trainer: dict[str, Any]) -> dict[str, Any]:
    return {**quiet_trainer, "limit_val_batches": 0}


@pytest.fixture
def texts(tmp_path: Path, bert: str) -> Texts:
    return Texts(tmp_path, bert)


KINDS: list[Callable[[Texts], Any]] = [
    Texts.stored, Texts.by_worker, Texts.streamed, Texts.labelled, Texts.streamed_labels
]  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("steps", [3, 7, 11])
def test_a_resumed_fit_sees_what_an_unbroken_one_does(
    make: Callable[[Texts], Any], steps: int, texts: Texts, quiet_trainer: dict[str, Any]
) -> None:
    """Within the first and the second epoch, which have 6 or 8 batches.

    Where `max_steps` ends a fit with an epoch's last batch, Lightning makes one batch of the next one and
    ends that too, whatever the loader is.
    """

    def fit(max_steps: int, resume: Path | None = None) -> list[tuple[int, list[int]]]:
        module = Recorder()
        trainer = Trainer(**quiet_trainer, max_steps=max_steps)
        trainer.fit(module, make(texts), ckpt_path=resume)
        trainer.save_checkpoint(texts.folder / f"{max_steps}.ckpt")
        return module.seen

    unbroken = fit(20)
    assert fit(steps) == unbroken[:steps]
    # Lightning counts the epoch in which a fit has ended as a whole one; the samples are what counts here.
    resumed = [ids for _, ids in fit(20, texts.folder / f"{steps}.ckpt")]
    assert resumed == [ids for _, ids in unbroken[steps:]]


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("make", [Texts.stored, Texts.streamed])
@pytest.mark.parametrize("when", [{"every_n_train_steps": 4}, {"every_n_epochs": 1}])
def test_what_a_callback_saves_is_resumed(
    make: Callable[[Texts], Any], when: dict[str, Any], texts: Texts, quiet_trainer: dict[str, Any]
) -> None:
    settings = {**quiet_trainer, "enable_checkpointing": True, "max_epochs": 2}
    module = Recorder()
    checkpoints = ModelCheckpoint(texts.folder / "saved", "{step}", save_top_k=-1, **when)
    Trainer(**settings, callbacks=[checkpoints]).fit(module, make(texts))
    saved = sorted((texts.folder / "saved").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(saved) >= 2
    for path in saved[:2]:
        again, steps = Recorder(), int(path.stem.partition("=")[2])
        other = ModelCheckpoint(texts.folder / f"again-{steps}", **when)
        Trainer(**settings, callbacks=[other]).fit(again, make(texts), ckpt_path=path)
        assert again.seen == module.seen[steps:]


def test_each_epoch_has_its_order_and_every_text(texts: Texts, quiet_trainer: dict[str, Any]) -> None:
    for make in (Texts.streamed, Texts.labelled):
        module = Recorder()
        Trainer(**quiet_trainer, max_epochs=2).fit(module, make(texts))
        orders = [[i for e, ids in module.seen if e == epoch for i in ids] for epoch in (0, 1)]
        assert orders[0] != orders[1]
        # w0 has the index 2.
        assert all(sorted(order)[:23] == list(range(2, 25)) for order in orders)


def test_processes_of_a_party_share_a_stream() -> None:
    def shares(length: int) -> list[list[int]]:
        progress = SimpleNamespace(epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)))
        trainers = [SimpleNamespace(world_size=2, global_rank=r, fit_loop=progress) for r in (0, 1)]
        return [list(Stream(lambda epoch: iter(range(length)), trainer)) for trainer in trainers]

    assert shares(6) == [[0, 2, 4], [1, 3, 5]]
    assert shares(7) == [[0, 2, 4], [1, 3, 5]], "as many to each, or one would wait for the other"


def test_a_second_fit_begins_anew(texts: Texts, quiet_trainer: dict[str, Any]) -> None:
    data, module = texts.stored(), Recorder()
    Trainer(**quiet_trainer, max_steps=4).fit(module, data)
    first, module.seen = module.seen, []
    Trainer(**quiet_trainer, max_steps=4).fit(module, data)
    assert module.seen == first
