"""Slot: a place in the rounds of a simulation, and what the party that has it brings to one."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.comm.party import Party
from pellm_lightning.comm.simulated.communicator import SimulatedCommunicator
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.loop.local_training import LocalTraining
from pellm_lightning.loop.round_loop import RoundLoop, Started
from pellm_lightning.loop.simulation.party_states import PartyState
from pellm_lightning.trainer.party_parameters.base import LocalParameters


class SlotTraining(LocalTraining):
    """Training of whichever parties have a slot, as its rounds see it.

    Args:
        whole: The training of the process, which all its parties share.
        optimizers: They hold the moments of the party's optimizers.
    """

    def __init__(self, whole: LocalTraining, optimizers: Sequence[Optimizer]) -> None:
        self._whole = whole
        self._optimizers = optimizers
        self.steps = 0
        """Batches that were trained on in this slot, by whichever party."""

    @property
    @override
    def step(self) -> int:
        return self.steps

    @property
    @override
    def epoch(self) -> int:
        return self._whole.epoch

    @property
    @override
    def planned_steps(self) -> float:
        return math.nan

    @property
    @override
    def optimizers(self) -> Sequence[Optimizer]:
        return self._optimizers

    @override
    def stop(self) -> None:
        self._whole.stop()

    @property
    @override
    def should_stop(self) -> bool:
        return self._whole.should_stop

    @override
    def save(self, path: str, *, leads: bool) -> str:
        return self._whole.save(path, leads=leads)

    @override
    def check_new_start(self, signature: str, round: int) -> None:
        self._whole.check_new_start(signature, round)


class Slot:
    """Slot of a worker: copies of the trainable parameters in memory, and the loop of rounds that they have.

    Args:
        communicator: Of the slot's place.
        factory: The callback's arguments.
        plan: The aggregation, applied to the module's parameters.
        trainable: The module's trainable parameters, which are copied.
        whole: The training of the process.
        shares_loss: Whether other parties may know the training loss.
    """

    def __init__(
        self,
        communicator: SimulatedCommunicator,
        factory: AggregatorFactory,
        plan: Plan,
        trainable: Mapping[str, nn.Parameter],
        whole: LocalTraining,
        *,
        shares_loss: bool,
    ) -> None:
        self.communicator = communicator
        self.parameters = {
            name: nn.Parameter(p.detach().to("cpu", copy=True)) for name, p in trainable.items()
        }
        self.optimizers = [Optimizer(list(self.parameters.values()), {}) for _ in whole.optimizers]
        self.training = SlotTraining(whole, self.optimizers)
        self.state: PartyState | None = None
        """What else is the party's own, once it has trained."""
        self.report: RoundReport | None = None
        """Of the last round."""
        self._aggregator: Aggregator | None = None
        self._party = Party(Topology())
        self.shared = {name: self.parameters[name] for name in sorted(plan.shared)}
        self.loop = RoundLoop(
            self.training,
            self._party,
            factory,
            plan,
            self.parameters,
            LocalParameters(self._party, self.shared),
            shares_loss=shares_loss,
            drift=None,
            on_round=self._keep,
            stopped_path="",
        )

    def start(self, make: Callable[[], Aggregator], state: Mapping[str, Any]) -> Started:
        """Agree with the other slots on what is shared; see ``RoundLoop.start``."""

        def kept() -> Aggregator:
            self._aggregator = make()
            return self._aggregator

        self.begin_round()
        return self.loop.start(kept, state)

    @property
    def aggregator(self) -> Aggregator:
        """The slot's aggregator, once it has started."""
        if self._aggregator is None:
            raise RuntimeError("A slot has no aggregator before it starts.")
        return self._aggregator

    @property
    def party(self) -> int:
        """The party that has the slot in this round."""
        return self.communicator.place[0]

    def begin_round(self) -> None:
        """Belong to another party, which has not trained yet."""
        party, num_parties = self.communicator.place
        self._party.topology = Topology(party, num_parties, label=self.communicator.name)
        self.state = None

    def end_round(self) -> None:
        """Bring what the party has trained to the round, or only take its result."""
        if self.state is None:
            self.loop.answer_round()
        else:
            self.loop.run_round()

    def trained(self) -> dict[str, Any] | None:
        """Return what a party has trained that waits for the others' turns; None before its turn."""
        if self.state is None:
            return None
        parameters = {name: p.detach().clone() for name, p in self.parameters.items()}
        return {"state": self.state, "parameters": parameters, "moments": copy.deepcopy(self._moments())}

    @torch.no_grad()
    def resume(self, trained: Mapping[str, Any] | None) -> None:
        """Restore what ``trained`` has returned, or the global parameters."""
        self.begin_round()
        if trained is not None:
            self.load_(trained["parameters"], trained["moments"])
            self.state = trained["state"]
            return
        for name, value in self.aggregator.global_parameters.items():
            self.parameters[name].copy_(value)

    def take_moments(self) -> list[dict[str, dict[str, Any]]]:
        """Return the moments of each optimizer, which the slot does not keep, by the parameters' names."""
        moments = self._moments()
        for held in self.optimizers:
            held.state.clear()
        return moments

    @torch.no_grad()
    def load_(self, own: Mapping[str, Tensor], moments: Sequence[Mapping[str, dict[str, Any]]]) -> None:
        """Let the slot have a party's own parameters, and moments of its optimizers."""
        for name, value in own.items():
            self.parameters[name].copy_(value)
        for held, by_name in zip(self.optimizers, moments, strict=True):
            held.state.clear()
            for name, of_parameter in by_name.items():
                held.state[self.parameters[name]] = of_parameter

    def _moments(self) -> list[dict[str, dict[str, Any]]]:
        return [
            {name: held.state[p] for name, p in self.parameters.items() if p in held.state}
            for held in self.optimizers
        ]

    def _keep(self, report: RoundReport, on_bar: bool) -> None:
        self.report = report
