"""Factory of the aggregator that a fit's rounds run on, from the arguments that all front ends share."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import Self

from pellm_lightning.aggregation import Aggregation, lora_modules
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm import Communicator, Quorum, check_quorum
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.auxiliary import AuxiliaryTerms
from pellm_lightning.engine.context import OnNonfinite, Settings, capabilities
from pellm_lightning.engine.fragments import fragments_of
from pellm_lightning.engine.outer_optimizer import OptimizerFactory, SchedulerFactory, sgd_one
from pellm_lightning.engine.overlap import Overlap
from pellm_lightning.exchange import Exchange, Plain
from pellm_lightning.exchange.base import as_exchange
from pellm_lightning.loop import arguments
from pellm_lightning.loop.parameters import Parameters
from pellm_lightning.loop.schedule import ARGUMENTS, Schedule, schedule
from pellm_lightning.loop.weighting import Measure, Weighting
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.tensors.adapter_config import adapter_configs
from pellm_lightning.tensors.frozen_state import frozen_state


@dataclass(frozen=True)
class AggregatorFactory:
    """Factory of aggregators; its fields are the arguments of ``FederatedAveraging`` of the same name.

    Raises:
        ValueError: If an argument is out of its range, or does not go with another.

    Example:
        >>> AggregatorFactory(every_n_steps=50).schedule
        Schedule(unit='steps', n=50.0)
    """

    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    every_n_seconds: float | None = None
    weighting: Measure | Weighting = "samples"
    aggregation: Aggregation | None = None
    exchange: Exchange = field(default_factory=Plain)
    privacy: GaussianMechanism | None = None
    overlap: Overlap = field(default_factory=Overlap)
    parameters: Parameters = field(default_factory=Parameters)
    outer_optimizer: OptimizerFactory = sgd_one
    outer_scheduler: SchedulerFactory | None = None
    inner_optimizer_state: Literal["keep", "reset"] = "keep"
    on_nonfinite: OnNonfinite = "exclude"
    quorum: Quorum = "majority"

    def __post_init__(self) -> None:
        for name, kind in (
            ("aggregation", Aggregation),
            ("privacy", GaussianMechanism),
            ("overlap", Overlap),
            ("parameters", Parameters),
        ):
            arguments.instance_of(name, getattr(self, name), kind)
        as_exchange(self.exchange)
        schedule(self.every_n_epochs, self.every_n_steps, self.every_n_seconds)
        arguments.privacy(self.privacy, self.weight_by)
        arguments.one_of("inner_optimizer_state", self.inner_optimizer_state, ("keep", "reset"))
        arguments.one_of("on_nonfinite", self.on_nonfinite, ("exclude", "raise"))
        check_quorum(self.quorum)
        arguments.outer(self.outer_optimizer, self.outer_scheduler)
        self.overlap.check_schedule(self.every_n_steps, self.every_n_seconds)

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Return the factory of a front end's settings, of which None stands for the default."""
        return cls(**{name: value for name, value in settings.items() if value is not None})

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

    def check_out_of_reach(self, rule: Aggregation | None, num_parties: int) -> None:
        """Refuse what clears a local optimizer's moments, or drops gradients: DeepSpeed keeps both to itself.

        Args:
            rule: The rule of the rounds; None if it is not known yet.
            num_parties: Parties of the federation.

        Raises:
            ValueError: If a setting or the rule does so.
        """
        clears, drops = "clears the moments of local optimizers", "drops the gradients of frozen factors"
        reasons = {
            f"inner_optimizer_state='reset' {clears}": self.inner_optimizer_state == "reset",
            f"on_nonfinite='exclude' {clears}": self.on_nonfinite == "exclude",
        }
        if rule is not None:
            reasons[f"aggregation={rule!r} {clears}"] = bool(rule.basis_changed(num_parties))
            reasons[f"aggregation={rule!r} {drops}"] = bool(rule.frozen_parts(0) | rule.frozen_parts(1))
        found = [reason for reason, applies in reasons.items() if applies]
        if found:
            raise ValueError(
                f"{found[0]}, which DeepSpeed keeps to itself. Set inner_optimizer_state='keep' and"
                " on_nonfinite='raise', with a rule that trains both factors and keeps their basis, such as"
                " Mean()."
            )

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
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        plan: Plan,
        auxiliary: AuxiliaryTerms | None,
        *,
        frozen: Mapping[str, Tensor | str] | None = None,
        config: Settings | None = None,
        files: Iterable[str] = (),
        facts: Mapping[str, Any] | None = None,
        state_dir: str | None = None,
    ) -> Aggregator:
        """Return the aggregator of a fit.

        Args:
            communicator: The joined parties.
            module: The module, with its adapter.
            parameters: Trainable tensors by name, the module's or others of the same shapes.
            plan: The rule applied to the parameters.
            auxiliary: What a drift correction adds to the rounds.
            frozen: What is frozen and must be equal, as of ``PartyParameters.frozen_state``; None takes the
                module's.
            config: What else must be the same at all parties.
            files: Where this party writes.
            facts: What the other parties learn of this party's fit.
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
            frozen=(frozen_state(module) if frozen is None else frozen)
            if self.parameters.check_frozen
            else None,
            adapters=adapter_configs(module),
            config={
                **{name: getattr(self, name) for name in ARGUMENTS},
                "weighting": self.weight_by if isinstance(self.weight_by, str) else "a number",
                "inner_optimizer_state": self.inner_optimizer_state,
                **(config or {}),
            },
            files=files,
            facts=facts or {},
            overlap=self.overlap,
            on_nonfinite=self.on_nonfinite,
            quorum=self.quorum,
            max_share=self.max_share,
            state_dir=state_dir,
        )
