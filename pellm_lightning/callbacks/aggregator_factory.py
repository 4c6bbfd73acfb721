"""Factory of the aggregator that a fit's rounds run on, from the arguments of ``FederatedAveraging``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pellm_lightning.aggregation import Aggregation, lora_modules
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.callbacks.drift.base import DriftCorrection, check_optimizer, drift_correction_of
from pellm_lightning.callbacks.parameters import Parameters
from pellm_lightning.callbacks.schedule import ARGUMENTS, Schedule, schedule
from pellm_lightning.callbacks.weight_averaging import agreed
from pellm_lightning.callbacks.weighting import Measure, Weighting
from pellm_lightning.comm import Communicator, Quorum
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.auxiliary import AuxiliaryTerms
from pellm_lightning.engine.context import OnNonfinite, capabilities
from pellm_lightning.engine.fragments import fragments_of
from pellm_lightning.engine.outer_optimizer import OptimizerFactory, SchedulerFactory, is_plain_averaging
from pellm_lightning.engine.overlap import Overlap
from pellm_lightning.exchange import Exchange
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.tensors.adapter_config import adapter_configs
from pellm_lightning.tensors.frozen_state import frozen_state
from pellm_lightning.trainer import isolation


@dataclass(frozen=True)
class AggregatorFactory:
    """Factory of aggregators; its fields are the callback's arguments of the same name."""

    aggregation: Aggregation | None
    exchange: Exchange
    privacy: GaussianMechanism | None
    overlap: Overlap
    outer_optimizer: OptimizerFactory
    outer_scheduler: SchedulerFactory | None
    on_nonfinite: OnNonfinite
    quorum: Quorum
    parameters: Parameters
    inner_optimizer_state: Literal["keep", "reset"]
    every_n_epochs: int | None
    every_n_steps: int | None
    every_n_seconds: float | None
    weighting: Measure | Weighting

    @property
    def weight_by(self) -> Measure:
        """What the parties count by."""
        return Weighting.of(self.weighting).by

    @property
    def max_share(self) -> float | None:
        """Cap on a party's share of the weights; None for none."""
        return Weighting.of(self.weighting).max_share

    @property
    def schedule(self) -> Schedule:
        """Schedule of the rounds of any fragment."""
        whole = schedule(self.every_n_epochs, self.every_n_steps, self.every_n_seconds)
        return whole.shared_by(self.overlap.fragments)

    @property
    def is_staggered(self) -> bool:
        """Whether a round does not give the result for all parameters at once."""
        return self.overlap.in_background or self.overlap.fragments > 1

    def plan(
        self, module: nn.Module, parameters: Mapping[str, Tensor], auxiliary: AuxiliaryTerms | None
    ) -> Plan:
        """Return the rule applied to a module's parameters.

        Raises:
            ValueError: If the rule cannot handle them, or does not go with the overlap.
        """
        allowed = capabilities(self.exchange, self.privacy, auxiliary)
        plan = Plan(self.aggregation, parameters, lora_modules(module), capabilities=allowed)
        self.overlap.check(plan.rule)
        fragments_of(plan.shared, self.overlap.fragments)
        return plan

    def make(
        self,
        communicator: Communicator,
        trainer: Trainer,
        module: LightningModule,
        parameters: Mapping[str, Tensor],
        plan: Plan,
        auxiliary: AuxiliaryTerms | None,
        *,
        facts: Mapping[str, Any] | None = None,
        state_dir: str | None = None,
    ) -> Aggregator:
        """Return the aggregator of a fit.

        Args:
            communicator: The joined parties.
            trainer: What the fit is run by.
            module: The module, with its adapter.
            parameters: Trainable tensors by name, the module's or others of the same shapes.
            plan: The rule applied to the parameters.
            auxiliary: What a drift correction adds to the rounds.
            facts: What the other parties are told of this party's fit.
            state_dir: Folder of the snapshots between separate jobs; None keeps none.

        Raises:
            ValueError: If something does not go together.
        """
        return Aggregator(
            communicator,
            parameters,
            plan=plan,
            exchange=self.exchange,
            privacy=self.privacy,
            auxiliary=auxiliary,
            outer_optimizer=self.outer_optimizer,
            outer_scheduler=self.outer_scheduler,
            frozen=frozen_state(module) if self.parameters.check_frozen else None,
            adapters=adapter_configs(module),
            config={
                **{name: getattr(self, name) for name in ARGUMENTS},
                "weighting": self.weight_by if isinstance(self.weight_by, str) else "a number",
                "inner_optimizer_state": self.inner_optimizer_state,
                "weight averaging": agreed(trainer),
            },
            files=isolation.written_paths(trainer),
            facts=facts or {},
            overlap=self.overlap,
            on_nonfinite=self.on_nonfinite,
            quorum=self.quorum,
            max_share=self.max_share,
            state_dir=state_dir,
        )

    def rehearsal(
        self,
        communicator: Communicator,
        trainer: Trainer,
        module: LightningModule,
        parameters: Mapping[str, Tensor],
    ) -> Aggregator:
        """Return an aggregator as a fit's, of other tensors; it keeps nothing on disk.

        Args:
            communicator: The joined parties.
            trainer: What the fit will be run by.
            module: The module with its adapter.
            parameters: Stand for the module's trainable parameters, by name.

        Raises:
            ValueError, MisconfigurationException: As the fit would.
        """
        drift = self.drift_correction(trainer, module)
        auxiliary = None if drift is None else drift.auxiliary
        plan = self.plan(module, parameters, auxiliary)
        return self.make(communicator, trainer, module, parameters, plan, auxiliary)

    def drift_correction(self, trainer: Trainer, module: LightningModule) -> DriftCorrection | None:
        """Return the Trainer's drift correction, None without.

        Raises:
            MisconfigurationException: If it does not go with the other arguments.
        """
        drift = drift_correction_of(trainer, module)
        if drift is None:
            return None
        if self.is_staggered:
            raise MisconfigurationException(
                f"{drift.auxiliary.method} corrects each local step by what the last round gave for all"
                " parameters, which with an overlap or fragments is not there yet. Leave out one of them."
            )
        optimizer = self.outer_optimizer([nn.Parameter(torch.zeros(1))])
        plain = is_plain_averaging(optimizer, scheduled=self.outer_scheduler is not None)
        try:
            drift.auxiliary.check(private=self.privacy is not None, plain=plain)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        return drift

    def check_optimizers(
        self, trainer: Trainer, drift: DriftCorrection | None, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Refuse local optimizers with which a drift correction would be wrong.

        Raises:
            MisconfigurationException: If one is such.
        """
        if drift is None:
            return
        for optimizer in trainer.optimizers:
            check_optimizer(trainer, optimizer, drift)
            drift.check(optimizer, parameters, resets=self.inner_optimizer_state == "reset")
