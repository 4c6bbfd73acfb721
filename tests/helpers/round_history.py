"""What the parties of an elastic federation have recorded of each round, and whether it fits together.

Each party's local training is a pure function of party and round, so one process can replay the whole history
in float64 from nothing but the members and weights of each round.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pellm_lightning import Aggregator

SIZE = 48


@dataclass(frozen=True)
class Entry:
    """The global state that a party took for settled."""

    party: str
    run_id: str
    round: int
    """Rounds that are in it."""
    attempt: int
    members: list[str]
    weights: list[float]
    """Of the members; empty if no round was run."""
    vector: list[float]
    """Its first ``SIZE`` values."""
    digest: str
    stage: Literal["made", "in doubt", "settled"]
    """Whether it was about to vote for it, or lost the rendezvous after its vote, or read the decision."""
    time: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Entry":
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Findings:
    """What is wrong with a history, and how long it is."""

    rounds: int
    divergent: list[int]
    """Rounds of which two parties have different results for good."""
    gaps: list[int]
    """Rounds that nobody has seen."""
    overruled: int
    """Results of parties that lost the rendezvous while in doubt, which the others then made differently."""
    lineages: int
    replay_error: float
    """Greatest distance from what one process computes in float64, of any round's vector."""

    @property
    def is_sound(self) -> bool:
        # A lost or doubled update moves the vector by some 1e-2, float32 by 1e-6 in a hundred rounds.
        return not self.divergent and not self.gaps and self.lineages <= 1 and self.replay_error < 1e-4


def noise(party: int, round: int, size: int = SIZE) -> Tensor:
    """What local training adds to the global vector (D,), float32."""
    generator = torch.Generator().manual_seed(1_000_003 * party + round + 1)
    first = torch.randn(SIZE, generator=generator)  # the same whatever the size
    return 0.1 * torch.cat([first, torch.randn(max(0, size - SIZE), generator=generator)])[:size]


def digest_of(vector: Tensor) -> str:
    return hashlib.sha256(vector.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def entry_of(aggregator: Aggregator, weights: Sequence[float], stage: Any) -> Entry:
    """Return what a party has now; ``weights`` are those of the members, empty without a round."""
    version = aggregator._global_state.version
    assert version is not None
    federation = aggregator.federation
    vector = aggregator.global_vector
    return Entry(
        federation.name,
        *version,
        members=list(federation.names),
        weights=list(weights),
        vector=vector[:SIZE].tolist(),
        digest=digest_of(vector),
        stage=stage,
    )


def recorded(aggregator: Aggregator, keep: Any) -> None:
    """Call ``keep(entry)`` for every result of this aggregator from now on: when made, and when settled."""
    federation: Any = aggregator.federation
    seen: dict[str, Any] = {"weights": [], "stage": "made"}
    counting, decided, commit = (
        aggregator._rounds._round_context,
        federation._commit_protocol.await_decision,
        aggregator._coordinator.commit,
    )
    prepare = aggregator._rounds._prepare

    def prepares(*arguments: Any) -> None:
        seen["weights"] = []
        prepare(*arguments)

    def counts(*arguments: Any) -> Any:
        seen["weights"] = arguments[-1]
        return counting(*arguments)

    def decides(*arguments: Any) -> Any:
        decision = decided(*arguments)
        seen["stage"] = "settled"
        return decision

    def settles(*arguments: Any) -> Any:
        seen["stage"] = "in doubt"
        keep(entry_of(aggregator, seen["weights"], "made"))
        committed = commit(*arguments)
        keep(entry_of(aggregator, seen["weights"], seen["stage"]))
        return committed

    aggregator._rounds._prepare = prepares  # type: ignore[method-assign]
    aggregator._rounds._round_context = counts  # type: ignore[method-assign]
    federation._commit_protocol.await_decision = decides
    aggregator._coordinator.commit = settles  # type: ignore[method-assign]


def findings(entries: Iterable[Entry], roster: Sequence[str]) -> Findings:
    """Judge a history."""
    of_round: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        of_round[entry.round].append(entry)
    divergent, standing = [], {}
    overruled = 0
    for round, of_it in sorted(of_round.items()):
        settled = [entry for entry in of_it if entry.stage == "settled"]
        attempts = {(entry.run_id, entry.attempt, entry.digest) for entry in of_it}
        twice = len(attempts) > len({attempt[:2] for attempt in attempts})
        if twice or len({entry.digest for entry in settled}) > 1:
            divergent.append(round)
        # What nobody has read the decision of may stand: the newest version that those have who go on.
        standing[round] = settled or of_it
        stand = {entry.digest for entry in standing[round]}
        overruled += sum(entry.stage == "in doubt" and entry.digest not in stand for entry in of_it)
    rounds = max((r for r, of_it in of_round.items() if any(e.stage != "made" for e in of_it)), default=0)
    return Findings(
        rounds=rounds,
        divergent=divergent,
        gaps=[round for round in range(rounds + 1) if round not in of_round],
        overruled=overruled,
        lineages=len({e.run_id for of_it in of_round.values() for e in of_it if e.stage == "settled"}),
        replay_error=_replayed(of_round, standing, rounds, roster),
    )


def _replayed(
    of_round: Mapping[int, list[Entry]],
    standing: Mapping[int, list[Entry]],
    rounds: int,
    roster: Sequence[str],
) -> float:
    """Return by how much the history differs from its replay in one process."""
    beginnings = {entry.digest: entry.vector for entry in standing.get(0, [])}
    ways = [(0.0, torch.tensor(vector, dtype=torch.float64)) for vector in beginnings.values()]
    for round in range(1, rounds + 1):
        # Each result that may stand, by whoever has run the round: others were handed it.
        digests = {entry.digest for entry in standing.get(round, [])}
        ran = {e.digest: e for e in of_round.get(round, []) if e.weights and e.digest in digests}
        ways = [_step(way, entry, roster) for way in ways for entry in ran.values()]
        if any(entry.stage == "settled" for entry in standing.get(round, [])):
            ways = sorted(ways, key=lambda way: way[0])[:1]
    return min((worst for worst, _ in ways), default=float("inf"))


def _step(way: tuple[float, Tensor], entry: Entry, roster: Sequence[str]) -> tuple[float, Tensor]:
    worst, x = way
    total = sum(entry.weights)
    for name, weight in zip(entry.members, entry.weights, strict=True):
        if weight:
            x = x + weight / total * noise(roster.index(name), entry.round - 1).double()
    return max(worst, float((x - torch.tensor(entry.vector, dtype=torch.float64)).abs().max())), x
