"""SimulatedRounds: the rounds of a simulation at one worker, and the states of its parties between them."""

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.simulated.held_parties import HeldParties
from pellm_lightning.engine import metrics
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.loop.round_loop import Started
from pellm_lightning.loop.simulation.party_states import PartyState, PartyStates
from pellm_lightning.loop.simulation.settings import Draw, Simulation
from pellm_lightning.loop.simulation.slot import Slot


class SimulatedRounds:
    """Rounds of a simulation at one worker.

    Each round begins by ``begin``, which gives its slots to the parties that were drawn, and ends by ``run``,
    in which they all take part as parties with a process each would.

    Args:
        simulation: Who takes part.
        held: The parties of a round, of which this worker holds some.
        slots: One for each of its places.
        states: Keeps what is the parties' own.
    """

    def __init__(
        self, simulation: Simulation, held: HeldParties, slots: list[Slot], states: PartyStates
    ) -> None:
        self._simulation = simulation
        self._held = held
        self.slots = slots
        self._states = states
        self._workers: dict[int, int] = {}  # which has a party's state
        self._rebased: dict[str, int] = {}  # the last round that gave a parameter another basis
        self.round = 0
        """Index of the round under way."""
        self.draw = simulation.draw(0)
        """Who takes part in it."""

    def start(self, make: Callable[[Slot], Aggregator], state: Mapping[str, Any]) -> Started:
        """Agree with the other workers on what is shared, and begin, or resume; see ``RoundLoop.start``."""
        of_slots = [{**of_slot, "aggregator": state["aggregator"]} for of_slot in state.get("slots", [])] or [
            {} for _ in self.slots
        ]
        if state:
            self._states.load_state_dict(state["states"])
            self._workers, self._rebased = dict(state["workers"]), dict(state["rebased"])
        started = self._held.run(
            [
                partial(slot.start, partial(make, slot), of_slot)
                for slot, of_slot in zip(self.slots, of_slots, strict=True)
            ]
        )
        self.round = started[0].round
        return started[0]

    def state(self) -> dict[str, Any]:
        """Return what ``start`` resumes from; the states of this worker's parties are in it."""
        of_slots = [slot.loop.state() for slot in self.slots]
        aggregator = of_slots[0]["aggregator"]
        return {
            "aggregator": aggregator,
            "slots": [{k: v for k, v in of_slot.items() if k != "aggregator"} for of_slot in of_slots],
            "states": self._states.state_dict(),
            "workers": self._workers,
            "rebased": self._rebased,
        }

    # ---- a round

    def begin(self) -> None:
        """Give the slots to the parties of the next round, and fetch their states from other workers."""
        self.assign()
        for slot in self.slots:
            slot.begin_round()
        self._move_states()

    def assign(self) -> None:
        """Give the places to the parties that were drawn."""
        self.draw = self._simulation.draw(self.round)
        self._held.assign([party for parties in dealt(self.draw, self._held) for party in parties])

    def training(self) -> list[Slot]:
        """Return the slots whose parties train in this round, in their order."""
        return [slot for slot in self.slots if slot.party in self.draw.training]

    def take_state(self, slot: Slot) -> PartyState | None:
        """Return the state of a slot's party, which the slot takes its share of; None before its first."""
        state = self._states.pop(slot.party)
        if state is None:
            return None
        moments = [
            {name: of for name, of in by_name.items() if self._rebased.get(name, -1) <= state["round"]}
            for by_name in state["moments"]
        ]
        slot.load_(state["own"], moments)
        return state

    def return_state(self, slot: Slot) -> None:
        """Let a slot's party not have trained in this round after all."""
        if slot.state is not None and slot.state["place"] is not None:
            self._keep(slot, self.round - 1)
        slot.take_moments()
        slot.state = None

    def run(self) -> RoundReport:
        """End the round: all parties take part that were drawn; return its report."""
        trained = [slot for slot in self.slots if slot.state is not None]
        self._held.run([slot.end_round for slot in self.slots])
        reports = [slot.report for slot in self.slots if slot.report is not None]
        self._rebased |= dict.fromkeys(self.slots[0].loop.basis_changed(reports[0]), self.round)
        for slot in trained:
            self._keep(slot, self.round)
        for worker, places in enumerate(self._held.held):
            self._workers |= {
                party: worker
                for party in self._held.parties[places.start : places.stop]
                if party in self.draw.training
            }
        self.round = reports[0].round + 1
        return _of_worker(reports)

    def finish(self) -> None:
        """End all rounds, with the other workers."""
        self._held.run([slot.loop.finish for slot in self.slots])
        self.discard()

    def discard(self) -> None:
        """Discard the parties' states, of which a checkpoint holds copies."""
        self._states.clear()

    def mean(self, local: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Return the mean over the workers of each named (value, weight)."""
        workers = self._held.workers
        joined = workers.join_quorum("metadata", None, {"metrics": dict(local)})
        of_workers = [metrics.read_metrics(name, said["metrics"]) for name, said in joined.metadata.items()]
        return metrics.mean_of(of_workers, workers)

    # ---- the parties' states

    def _keep(self, slot: Slot, round: int) -> None:
        """Keep what is the own of a slot's party, up to a round."""
        own = {n: p.detach().clone() for n, p in slot.parameters.items() if n not in slot.shared}
        state = {**(slot.state or {}), "own": own, "moments": slot.take_moments(), "round": round}
        self._states.put(slot.party, state)

    def _move_states(self) -> None:
        """Send the states of parties that another worker holds now to it."""
        held, workers = self._held, self._held.workers
        moves: list[tuple[int, int, int]] = []
        for worker, places in enumerate(held.held):
            for party in held.parties[places.start : places.stop]:
                if self._workers.get(party, worker) != worker and party in self.draw.training:
                    moves.append((party, self._workers[party], worker))
        if not moves:
            return
        packed = {party: _packed(self._states.pop(party)) for party, old, _ in moves if old == workers.party}
        sizes = {str(party): len(data) for party, data in packed.items()}
        joined = workers.join_quorum("exchange", None, {"sizes": sizes})
        size = {int(party): n for said in joined.metadata.values() for party, n in said["sizes"].items()}
        count, mine = workers.num_parties, workers.party
        none = torch.zeros(0, dtype=torch.uint8)
        parts = [
            torch.cat([none, *(packed[p] for p, old, new in moves if old == mine and new == to)])
            for to in range(count)
        ]
        incoming = [[p for p, old, new in moves if old == of and new == mine] for of in range(count)]
        received = workers.all_to_all(parts, [sum(size[p] for p in of) for of in incoming])
        for parties, values in zip(incoming, received, strict=True):
            for party, data in zip(parties, values.split([size[p] for p in parties]), strict=True):
                state = _unpacked(data)
                if state is not None:  # it was drawn, and the round ended before its turn
                    self._states.put(party, state)


def dealt(draw: Draw, held: HeldParties) -> list[list[int]]:
    """Return which parties each worker holds: in order, so that ties are broken as with any other number.

    Only if one would have none that trains, those that do are dealt in turn.

    Raises:
        FederationError: If a worker has none even then.
    """
    hands = [list(draw.parties[places.start : places.stop]) for places in held.held]
    if not _idle(hands, draw):
        return hands
    first, hands = sorted(draw.parties, key=lambda p: (p not in draw.training, p)), [[] for _ in held.held]
    for party in first:
        free = [w for w, places in enumerate(held.held) if len(hands[w]) < len(places)]
        hands[min(free, key=lambda w: (len(hands[w]), w))].append(party)
    if _idle(hands, draw):
        raise FederationError(
            f"Only {len(draw.training)} of the {len(draw.parties)} parties of a round train, and"
            f" {len(hands)} processes would hold them. Launch fewer processes, or sample more parties."
        )
    return [sorted(hand) for hand in hands]


def _idle(hands: list[list[int]], draw: Draw) -> bool:
    return any(draw.training.isdisjoint(hand) for hand in hands)


def _packed(state: PartyState | None) -> Tensor:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpacked(data: Tensor) -> PartyState | None:
    state: PartyState | None = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
    return state


def _of_worker(reports: list[RoundReport]) -> RoundReport:
    """Return the report of a worker's parties together."""
    first, weight = reports[0], sum(report.weight for report in reports)
    losses = [(r.local_loss, r.weight) for r in reports if r.local_loss is not None and r.weight]
    count = len(reports)
    return replace(
        first,
        weight=weight,
        local_loss=sum(loss * w for loss, w in losses) / sum(w for _, w in losses) if losses else None,
        seconds=max(report.seconds for report in reports),
        bytes_sent=sum(report.bytes_sent for report in reports),
        update_norm=sum(report.update_norm for report in reports) / count,
        distance=sum(report.distance for report in reports) / count,
        last=any(report.last for report in reports),
    )
