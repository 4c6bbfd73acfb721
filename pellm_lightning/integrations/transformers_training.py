"""TransformersTraining: the training of transformers' Trainer, as rounds see it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from pellm_lightning.comm import FederationError
from pellm_lightning.integrations.federated_loop import save_trained
from pellm_lightning.loop.local_training import LocalTraining

STATE_FILE = "federation.pt"
"""Name of the federated state in each of the Trainer's checkpoints."""


class TransformersTraining(LocalTraining):
    """Training of transformers' ``Trainer``, as rounds see it.

    Args:
        args: The Trainer's arguments.
        state: Its progress.
        control: What stops it.
        model: What it trains.
        optimizer: Its optimizer, perhaps wrapped by accelerate.
    """

    def __init__(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
    ) -> None:
        self.state, self.control = state, control
        self.epochs = 0
        self._model = model
        self._optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._output_dir = Path(str(args.output_dir))
        # The Trainer multiplies a loss averaged over all processes' tokens, but only after the forward pass.
        self._processes = args.world_size if args.average_tokens_across_devices else 1
        self._samples = 0
        self._loss: Tensor | None = None

    def add_part(self, samples: int, loss: Tensor | None) -> None:
        """Add samples of a batch, and its loss, which is divided by the tokens of the whole step."""
        self._samples += samples
        if loss is not None:
            part = loss.detach() * self._processes
            self._loss = part if self._loss is None else self._loss + part

    def counted(self) -> tuple[int, Tensor | None]:
        """Return the samples of the parts of a step, and their mean loss; begin the next step."""
        samples, loss, self._samples, self._loss = self._samples, self._loss, 0, None
        return samples, loss

    @property
    @override
    def step(self) -> int:
        return self.state.global_step

    @property
    @override
    def epoch(self) -> int:
        return self.epochs

    @property
    @override
    def planned_steps(self) -> float:
        return float(self.state.max_steps) if self.state.max_steps > 0 else math.nan

    @property
    @override
    def optimizers(self) -> Sequence[Optimizer]:
        return [self._optimizer]

    @override
    def stop(self) -> None:
        self.control.should_training_stop = True

    @property
    @override
    def should_stop(self) -> bool:
        return bool(self.control.should_training_stop)

    @override
    def save(self, path: str, *, leads: bool) -> str:
        save_pretrained = getattr(self._model, "save_pretrained", None)
        if leads and save_pretrained is not None:
            save_pretrained(path)
        elif leads:
            save_trained(self._model, path, step=self.step, epoch=self.epoch)
        return (
            "It holds the trained parameters without the optimizer: load them into the model of a new"
            " training, or resume by train(resume_from_checkpoint=True) from the last checkpoint."
        )

    @override
    def check_new_start(self, signature: str, round: int) -> None:
        for path in sorted(self._output_dir.glob(f"checkpoint-*/{STATE_FILE}")):
            if torch.load(path, weights_only=True).get("signature") == signature:
                raise FederationError(
                    f"This party starts at step 0 in a federation that is in round {round}, but has the"
                    f" checkpoint {path.parent} of it. Resume by train(resume_from_checkpoint=True), or move"
                    " the checkpoint away."
                )
