"""Turns: which party the one module belongs to, batch by batch, and the round that ends its last turn."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellm_lightning.comm.simulated.held_parties import HeldParties
from pellm_lightning.engine.round_report import RoundReport
from pellm_lightning.loop.schedule import Schedule
from pellm_lightning.loop.simulation.live_training import LiveTraining
from pellm_lightning.loop.simulation.party_batches import PartyBatches
from pellm_lightning.loop.simulation.random_state import random_state, seed_all, set_random_state
from pellm_lightning.loop.simulation.rounds import SimulatedRounds, dealt
from pellm_lightning.loop.simulation.settings import Simulation
from pellm_lightning.loop.simulation.slot import Slot


@dataclass(frozen=True)
class RoundPlan:
    """Plan of a round at one worker, known before it begins.

    Args:
        loaders: Of each of its parties that trains, by index.
        batches: How many batches each trains on.
    """

    loaders: Mapping[int, Any]
    batches: Mapping[int, int]

    def __len__(self) -> int:
        """Return the batches of the whole round."""
        return sum(self.batches.values())

    @classmethod
    def of(
        cls,
        simulation: Simulation,
        held: HeldParties,
        round: int,
        load: Callable[[int], Any],
        schedule: Schedule,
    ) -> "RoundPlan":
        """Return the plan of a round.

        Args:
            simulation: Who takes part.
            held: The parties of a round.
            round: Its index.
            load: Returns a party's loader.
            schedule: How long a party trains.

        Raises:
            ValueError: If a loader has no length, or no batch.
        """
        draw = simulation.draw(round)
        parties = [party for party in dealt(draw, held)[held.workers.party] if party in draw.training]
        loaders = {party: load(party) for party in parties}
        return cls(loaders, {party: _batches(party, loader, schedule) for party, loader in loaders.items()})


class Turns:
    """Turns of a worker's parties at the one module.

    A turn begins when its party's first batch is asked for: then its random numbers are drawn from.

    Args:
        simulation: The seeds of parties that have not trained yet.
        rounds: The rounds.
        live: The module.
        device: Of the module.
    """

    def __init__(
        self, simulation: Simulation, rounds: SimulatedRounds, live: LiveTraining, device: torch.device
    ) -> None:
        self._simulation = simulation
        self._rounds = rounds
        self._live = live
        self._device = device
        self._plan = RoundPlan({}, {})
        self._waiting: deque[Slot] = deque()
        self._slot: Slot | None = None  # whose party the module belongs to
        self._left = 0  # batches of its turn
        self._place: Mapping[str, Any] | None = None  # where its data and random numbers begin
        self._batches: PartyBatches | None = None
        self._outside: dict[str, Any] = {}  # random numbers of whatever is no party's

    @property
    def slot(self) -> Slot | None:
        """The slot whose party trains now."""
        return self._slot

    def begin_round(self, plan: RoundPlan) -> None:
        """Begin a round, with the turn of its first party; nothing if one is under way, as after resuming."""
        self._plan = plan
        if self._slot is None:
            self._rounds.begin()
            self._waiting = deque(self._rounds.training())
            self._begin_turn()

    def next_batch(self) -> Any:
        """Return the next batch of the party whose turn it is."""
        if self._slot is None:
            raise RuntimeError("A batch was asked for between two rounds, when it is no party's turn.")
        if self._batches is None:
            self._enter(self._slot.party)
        assert self._batches is not None
        return next(self._batches)

    def count(self, samples: int, loss: Tensor | None, parts: int) -> None:
        """Count a batch for the party whose turn it is; see ``RoundLoop.count``."""
        if self._slot is not None:
            self._slot.loop.count(samples, loss, parts)

    def after_batch(self) -> RoundReport | None:
        """End the turn if that was its last batch, and after the last turn the round; return its report."""
        assert self._slot is not None
        self._slot.training.steps += 1
        self._left -= 1
        if self._left:
            return None
        self._end_turn()
        if self._waiting:
            self._begin_turn()
            return None
        return self._end_round()

    def close_round(self) -> RoundReport | None:
        """End a round that was cut short, with those that have trained; return its report."""
        slot = self._slot
        if slot is None:
            return None
        has_trained = self._left < self._plan.batches[slot.party]
        self._end_turn()
        if not has_trained:
            self._rounds.return_state(slot)
        self._waiting.clear()
        return self._end_round()

    # ---- the state

    def state(self) -> dict[str, Any]:
        """Return what ``resume`` continues from, but what the module itself holds."""
        turn = None
        if self._slot is not None:
            place = self._place if self._batches is None else self._where()
            outside = self._outside if self._batches is not None else random_state(self._device)
            index = self._rounds.slots.index(self._slot)
            turn = {"slot": index, "left": self._left, "place": place, "outside": outside}
        waiting = [self._rounds.slots.index(slot) for slot in self._waiting]
        return {
            "turn": turn,
            "waiting": waiting,
            "trained": [slot.trained() for slot in self._rounds.slots],
            "initial": self._live.initial,
            "changed": self._live.changed,
        }

    def resume(self, state: Mapping[str, Any], plan: RoundPlan) -> None:
        """Continue, once the rounds have started; the module is as it was when the state was saved.

        Args:
            state: As of ``state()``.
            plan: Of the round that was under way.
        """
        self._plan = plan
        self._live.resume(state["initial"], state["changed"])
        self._rounds.assign()
        for slot, trained in zip(self._rounds.slots, state["trained"], strict=True):
            slot.resume(trained)
        turn = state["turn"]
        if turn is not None:
            self._slot = self._rounds.slots[turn["slot"]]
            self._left, self._place, self._outside = turn["left"], turn["place"], turn["outside"]
            self._waiting = deque(self._rounds.slots[index] for index in state["waiting"])

    # ---- a turn

    def _begin_turn(self) -> None:
        slot = self._slot = self._waiting.popleft()
        state = self._rounds.take_state(slot)
        if state is None:
            slot.load_(self._live.initial["own"], [{} for _ in slot.optimizers])
        self._live.load_(slot, state or self._live.initial)
        self._place = None if state is None else state["place"]
        self._left = self._plan.batches[slot.party]

    def _enter(self, party: int) -> None:
        """Begin to draw from a party's random numbers, and data."""
        self._outside = random_state(self._device)
        loader, place = self._plan.loaders[party], self._place
        if place is None:
            seed_all(self._simulation.party_seed(party))
            self._batches = PartyBatches(loader, None, self._device)
        else:
            set_random_state(place["random_now"], self._device)
            self._batches = PartyBatches(loader, place, self._device)

    def _where(self) -> dict[str, Any]:
        assert self._batches is not None
        return self._batches.place() | {"random_now": random_state(self._device)}

    def _end_turn(self) -> None:
        slot, self._slot = self._slot, None
        assert slot is not None
        place = self._place if self._batches is None else self._where()
        slot.state = self._live.save_(slot) | {"place": place}
        if self._batches is not None:
            set_random_state(self._outside, self._device)
        self._batches = self._place = None

    def _end_round(self) -> RoundReport:
        report = self._rounds.run()
        self._live.rest_(self._rounds.slots[0])
        return report


def _batches(party: int, loader: Any, schedule: Schedule) -> int:
    """Return the batches of a party's turn."""
    if schedule.unit == "steps":
        return int(schedule.n)
    try:
        size = len(loader)
    except TypeError:
        raise ValueError(
            f"The loader of party {party} has no length, so that nobody knows how long its epoch is. Use"
            " every_n_steps."
        ) from None
    if not size:
        raise ValueError(f"The loader of party {party} has no batch. Give every party a sample.")
    return size * int(schedule.n)
