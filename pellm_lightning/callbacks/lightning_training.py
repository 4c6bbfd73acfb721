"""LightningTraining: the fit of a Lightning Trainer as the rounds see it, and its aggregator."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.callbacks.drift.base import drift_correction
from pellm_lightning.callbacks.fit_facts import planned_steps
from pellm_lightning.callbacks.weight_averaging import agreed
from pellm_lightning.comm import Communicator
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.auxiliary import AuxiliaryTerms
from pellm_lightning.engine.context import Settings
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.loop.local_training import LocalTraining
from pellm_lightning.trainer import isolation, resume
from pellm_lightning.trainer.samples import SampleCounter, batch_copies


class LightningTraining(LocalTraining):
    """Fit of a Lightning Trainer.

    Args:
        trainer: The Trainer.
        name: Name of the party.
        stopped_path: Where its checkpoint is saved if it has to stop below a quorum.
        warns: Whether to warn once of a batch whose number of samples is unknown.
    """

    def __init__(self, trainer: Trainer, name: str, stopped_path: str, *, warns: bool) -> None:
        self._trainer = trainer
        self._name = name
        self._stopped_path = stopped_path
        self._samples = SampleCounter(warns=warns)

    @property
    @override
    def step(self) -> int:
        return self._trainer.global_step

    @property
    @override
    def epoch(self) -> int:
        return self._trainer.current_epoch

    @property
    @override
    def planned_steps(self) -> float:
        return planned_steps(self._trainer)

    @property
    @override
    def optimizers(self) -> Sequence[Optimizer]:
        return self._trainer.optimizers

    @property
    @override
    def batch_copies(self) -> int:
        return batch_copies(self._trainer)

    @override
    def stop(self) -> None:
        self._trainer.should_stop = True

    @property
    @override
    def should_stop(self) -> bool:
        return self._trainer.should_stop

    @override
    def save(self, path: str, *, leads: bool) -> str:
        self._trainer.save_checkpoint(path)
        return "Resume it from there."

    @override
    def check_new_start(self, signature: str, round: int) -> None:
        path = resume.newest_signed(self._trainer, signature, self._stopped_path)
        if path is not None:
            raise resume.unused_checkpoint_error(path, party=self._name, round=round)

    def counted(self, outputs: Any, batch: Any, batch_idx: int) -> tuple[int, Tensor | None, int]:
        """Return the samples of a batch, a part of their mean loss, and of how many; 0 if it was skipped."""
        trainer = self._trainer
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        # Lightning skips the step if the batch or the loss is None; manual optimization need not return any.
        if loss is None and (batch is None or trainer.lightning_module.automatic_optimization):
            return 0, None, 1
        samples = self._samples.count(batch, trainer.train_dataloader, batch_idx)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return samples, None, 1
        # Lightning passes the loss divided by the number of batches that it accumulates (which is 1 with
        # manual optimization).
        return samples, loss, trainer.accumulate_grad_batches


def make_aggregator(
    factory: AggregatorFactory,
    communicator: Communicator,
    trainer: Trainer,
    module: LightningModule,
    parameters: Mapping[str, Tensor],
    plan: Plan,
    auxiliary: AuxiliaryTerms | None,
    *,
    frozen: Mapping[str, Tensor | str] | None = None,
    settings: Settings | None = None,
    facts: Mapping[str, Any] | None = None,
    state_dir: str | None = None,
) -> Aggregator:
    """Return the aggregator of a fit; the arguments are those of ``AggregatorFactory.make``.

    ``settings`` is what must be the same at all parties in addition.
    """
    return factory.make(
        communicator,
        module,
        parameters,
        plan,
        auxiliary,
        frozen=frozen,
        config={"weight averaging": agreed(trainer), **(settings or {})},
        files=isolation.written_paths(trainer),
        facts=facts,
        state_dir=state_dir,
    )


def rehearse(
    factory: AggregatorFactory,
    communicator: Communicator,
    trainer: Trainer,
    module: LightningModule,
    parameters: Mapping[str, Tensor],
) -> Aggregator:
    """Return an aggregator as a fit's, of other tensors; it keeps nothing on disk.

    Args:
        factory: The callback's arguments.
        communicator: The joined parties.
        trainer: What the fit will be run by.
        module: The module with its adapter.
        parameters: Stand for the module's trainable parameters, by name.

    Raises:
        ValueError, MisconfigurationException: As the fit would.
    """
    drift = drift_correction(factory, trainer, module)
    auxiliary = None if drift is None else drift.auxiliary
    plan = factory.plan(module, parameters, auxiliary)
    return make_aggregator(factory, communicator, trainer, module, parameters, plan, auxiliary)
