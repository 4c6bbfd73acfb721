"""How parties meet: each says why it comes before anything else crosses, and all agree on what came of it.

Parties of one launch meet all or not at all. Separate jobs meet with those who are there, and the result of a
round is everybody's or nobody's.
"""

import hashlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from typing_extensions import override

from pellm_lightning.comm import (
    Collectives,
    ElasticFederation,
    FederationError,
    Intent,
    MismatchError,
    PartyLostError,
    QuorumView,
    Version,
)
from pellm_lightning.comm.elastic.quorum_view import is_count
from pellm_lightning.engine import compatibility
from pellm_lightning.engine.compatibility import PartySpec
from pellm_lightning.exchange import Exchange
from pellm_lightning.tensors import snapshot
from pellm_lightning.tensors.snapshot import SnapshotDir

log = logging.getLogger(__name__)

MAX_WEIGHT = float(1 << 53)
"""No party counts more: whole numbers up to here are exact in float64, and a sum of many is finite."""
# A sum of many is finite.
_MAX_SUMMAND = 1e300


class Purpose(IntEnum):
    """Why a party comes to meet the others."""

    ROUND = 1
    METRICS = 2
    DONE = 3
    JOIN = 4


@dataclass(frozen=True)
class Header:
    """What a party says before anything else crosses; the same few numbers whatever follows."""

    purpose: Purpose
    round: int
    weight: float
    """How much the party counts; where the exchange hides that, 1 if it counts at all."""
    fine: bool = True
    """Whether all values of the party are finite, as far as it knows yet."""
    tag: str = ""
    """Of the party's present values: another one after each round, and in each process."""
    exposed: tuple[str, ...] = ()
    """Whose values were in a sum with its present ones that it has revealed, in an attempt that failed then;
    as ``values_of`` says."""
    releases: int = 0
    """Noisy releases of the party in attempts at this round that failed."""
    loss: float = math.nan
    """Training loss of the party since the last round; NaN where that is nobody's business, or unknown."""
    distance: float = math.nan
    """2-norm of the party's parameters minus the result, in the round before; NaN as above."""
    steps_left: float = math.nan
    """Optimizer steps that the party still has to make; NaN as above."""
    behind: bool = False
    """Whether the party lacks the newest global parameters, and so needs them and counts 0."""

    def values_of(self, name: str) -> str:
        """Return what names the present values of the party that said this."""
        return f"{name}/{self.tag}"


class Coordinator(ABC):
    """How the parties of an aggregator come together, and how the result of a round becomes everybody's."""

    rejoins: bool
    """Whether parties may be lost and come back; then an attempt at a round may fail and is made again."""

    @abstractmethod
    def handshake(self, mine: PartySpec) -> None:
        """Compare what all parties must share.

        Raises:
            MismatchError: If parties differ; no parameter was touched.
        """

    @abstractmethod
    def party_specs(self) -> list[PartySpec]:
        """Return the passports of those who meet, in their order."""

    @abstractmethod
    def meet(self, mine: Header, version: Version | None) -> list[Header]:
        """Wait for the parties and learn why each came; help those that came for metrics first."""

    @abstractmethod
    def mean(
        self, values: Mapping[str, tuple[float, float]], round: int, version: Version | None
    ) -> dict[str, float]:
        """Return the weighted mean over the parties of each named (value, weight), equal on all parties."""

    @abstractmethod
    def version(self, round: int) -> Version | None:
        """Return the version of the global parameters that the present attempt makes."""

    @abstractmethod
    def commit(self, round: int, state: Mapping[str, Any]) -> None:
        """Agree with the others that the result of this attempt stands.

        Raises:
            PartyLostError: If it does not; nothing may be kept of it.
        """

    @abstractmethod
    def again(self, error: PartyLostError) -> bool:
        """Give up an attempt that failed; return whether to make another."""

    @abstractmethod
    def restored(self) -> dict[str, Any] | None:
        """Return the state that this party made durable in an earlier life, None if there is none."""

    @abstractmethod
    def finished(self, version: Version | None) -> None:
        """Forget what was kept for coming back, since the federation has ended."""


class LaunchCoordinator(Coordinator):
    """All parties of one launch: whoever is lost, all stop.

    Args:
        federation: The joined parties.
        exchange: How metrics are summed.
    """

    rejoins = False

    def __init__(self, federation: Any, exchange: Exchange) -> None:
        self._federation = federation
        self._exchange = exchange
        self._passports: list[PartySpec] = []

    @override
    def handshake(self, mine: PartySpec) -> None:
        self._passports = self._federation.all_gather_json("party_spec", mine)
        difference = compatibility.first_difference(self._passports)
        if difference:
            raise MismatchError(difference)

    @override
    def party_specs(self) -> list[PartySpec]:
        return self._passports

    @override
    def meet(self, mine: Header, version: Version | None) -> list[Header]:
        """Wait for all parties.

        Parties are uneven: one validates while another is already in its next round. Every header has the
        same size, so they can meet anywhere, and whoever came for something else meets again afterwards.
        """
        while True:
            self._federation.enter(f"meeting for round {mine.round}")
            headers = self._exchanged(mine)
            if mine.purpose is Purpose.METRICS or all(h.purpose is not Purpose.METRICS for h in headers):
                self._federation.enter(f"in round {mine.round}")
                return headers
            self._mean({})

    @override
    def mean(
        self, values: Mapping[str, tuple[float, float]], round: int, version: Version | None
    ) -> dict[str, float]:
        self.meet(Header(Purpose.METRICS, round, 0.0), None)
        return self._mean(values)

    @override
    def version(self, round: int) -> None:
        return None

    @override
    def commit(self, round: int, state: Mapping[str, Any]) -> None:
        pass  # whoever fails from here on stops all others, too

    @override
    def again(self, error: PartyLostError) -> bool:
        return False

    @override
    def restored(self) -> None:
        return None

    @override
    def finished(self, version: Version | None) -> None:
        pass

    def _exchanged(self, mine: Header) -> list[Header]:
        federation = self._federation
        numbers = [
            mine.purpose,
            mine.round,
            mine.weight,
            mine.fine,
            mine.loss,
            mine.distance,
            mine.steps_left,
        ]
        rows = torch.zeros(federation.num_parties, len(numbers), dtype=torch.float64)
        rows[federation.party] = torch.tensor(numbers, dtype=torch.float64)
        federation.all_reduce_(rows)
        if self._exchange.is_secure and rows[federation.party, :4].tolist() != [
            *map(float, astuple(mine)[:4])
        ]:
            raise _changed(federation.name)
        return [
            Header(
                Purpose(int(purpose)),
                int(number),
                weight,
                fine == 1,
                loss=loss,
                distance=distance,
                steps_left=left,
            )
            for purpose, number, weight, fine, loss, distance, left in rows.tolist()
        ]

    def _mean(self, values: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        told = self._federation.all_gather_json("metrics", _known(values))
        return summed(values, told, self._federation, self._exchange)


class ElasticCoordinator(Coordinator):
    """Separate jobs: those who are there go on, and whoever comes back takes over where they are.

    Args:
        federation: The joined parties.
        exchange: How metrics are summed.
        state_dir: Where this party keeps the global state through its own death; None keeps it in memory.
    """

    rejoins = True

    def __init__(
        self, federation: ElasticFederation, exchange: Exchange, state_dir: SnapshotDir | None
    ) -> None:
        self._federation = federation
        self._exchange = exchange
        self._state_dir = state_dir
        self._attempt = 0
        self._run_id = ""

    @override
    def handshake(self, mine: PartySpec) -> None:
        federation = self._federation
        mine = mine | {"config": mine["config"] | federation.shared}
        shared = json.dumps(compatibility.common(mine), sort_keys=True)
        if self._state_dir is not None:
            federation.remember(self._state_dir.reserved())
        others = federation.handshake(mine, hashlib.sha256(shared.encode()).hexdigest(), _difference)
        with _readable("the others"):
            conflict = compatibility.shared_file([mine, *others.values()], [federation.name, *others])
        if conflict:
            raise MismatchError(conflict)

    @override
    def party_specs(self) -> list[PartySpec]:
        told = [dict(self._federation.spec_of(party)) for party in range(self._federation.num_parties)]
        for name, of_party in zip(self._federation.names, told, strict=True):
            with _readable(name):
                of_party["lora"] = {
                    str(pair): [int(rank), float(scaling)]
                    for pair, (rank, scaling) in of_party["lora"].items()
                }
                if of_party["lora"].keys() != told[self._federation.party]["lora"].keys():
                    raise ValueError("other pairs")
        return told

    @override
    def meet(self, mine: Header, version: Version | None) -> list[Header]:
        wants: Intent = "rest" if mine.purpose is Purpose.DONE else "exchange"
        words = {
            "purpose": int(mine.purpose),
            "round": mine.round,
            "weight": mine.weight,
            "fine": mine.fine,
            "tag": mine.tag,
            "exposed": list(mine.exposed),
            "releases": mine.releases,
            # JSON has no NaN.
            "loss": mine.loss if math.isfinite(mine.loss) else None,
            "distance": mine.distance if math.isfinite(mine.distance) else None,
            "steps_left": mine.steps_left if math.isfinite(mine.steps_left) else None,
        }
        while True:
            self._federation.enter(f"meeting for round {mine.round}")
            plan = self._federation.join_quorum(wants, version, words)
            self._attempt, self._run_id = plan.attempt, plan.run_id
            if self._state_dir is not None:
                self._state_dir.reserve(plan.attempt)  # before any member can make its result durable
            if self._exchange.is_secure and plan.entries[self._federation.name].words != words:
                raise _changed(self._federation.name)
            newest = plan.newest
            headers = [
                replace(_header(name, roll.words), behind=roll.version != newest)
                for name, roll in plan.entries.items()
            ]
            if all(header.purpose is not Purpose.METRICS for header in headers):
                self._federation.enter(f"in round {mine.round}")
                return headers
            if plan.exchanges:
                self._sum_metrics(plan, {})

    @override
    def mean(
        self, values: Mapping[str, tuple[float, float]], round: int, version: Version | None
    ) -> dict[str, float]:
        return (self._hidden_mean if self._exchange.is_secure else self._open_mean)(values, round, version)

    def _hidden_mean(
        self, values: Mapping[str, tuple[float, float]], round: int, version: Version | None
    ) -> dict[str, float]:
        """Sum metrics as a round sums parameters: nobody's own values may be told in words."""
        values = dict(values)
        while True:
            words = {"purpose": int(Purpose.METRICS), "round": round, "weight": 0.0, "names": _known(values)}
            self._federation.enter("averaging metrics")
            plan = self._federation.join_quorum("exchange", version, words)
            mean = self._sum_metrics(plan, values)
            if mean is not None:
                return mean

    def _sum_metrics(
        self, plan: QuorumView, values: dict[str, tuple[float, float]]
    ) -> dict[str, float] | None:
        """Sum what the members told that they have; None if the attempt failed.

        What a sum may have shown already is not summed again with others: their difference would show more.
        """
        told = [_names(name, roll.words.get("names", {})) for name, roll in plan.entries.items()]
        revealed = False

        def revealing() -> None:
            nonlocal revealed
            revealed = True

        try:
            mean = summed(values, told, self._federation, self._exchange, revealing)
            self._federation.commit(snapshot.digest({"metrics": sorted(mean.items())}))
        except PartyLostError as error:
            self._federation.fail(error)
            if revealed:
                values.clear()
            return None
        return mean

    def _open_mean(
        self, values: Mapping[str, tuple[float, float]], round: int, version: Version | None
    ) -> dict[str, float]:
        words = {"purpose": int(Purpose.METRICS), "round": round, "weight": 0.0, "metrics": dict(values)}
        self._federation.enter("averaging metrics")
        plan = self._federation.join_quorum("words", version, words)
        told = [_metrics(name, roll.words.get("metrics", {})) for name, roll in plan.entries.items()]
        missing = _warn_of_nonfinite([_known(of_party) for of_party in told], self._federation)
        totals: dict[str, list[float]] = {}
        for of_party in told:
            for metric in _known(of_party)["finite"]:
                value, weight = of_party[metric]
                total = totals.setdefault(metric, [0.0, 0.0])
                total[0] += value * weight
                total[1] += weight
        mean = {metric: total / weight for metric, (total, weight) in totals.items()}
        return dict(sorted((missing | mean).items()))

    @override
    def version(self, round: int) -> Version:
        return Version(self._run_id, round, self._attempt)

    @override
    def commit(self, round: int, state: Mapping[str, Any]) -> None:
        kept = self._state_dir
        self._federation.commit(snapshot.digest(state) if kept is None else kept.keep(round, state))

    @override
    def again(self, error: PartyLostError) -> bool:
        self._federation.fail(error)
        return True

    @override
    def restored(self) -> dict[str, Any] | None:
        return None if self._state_dir is None else self._state_dir.newest()

    @override
    def finished(self, version: Version | None) -> None:
        if version is not None:
            self._federation.ended(version)
        if self._state_dir is not None:
            self._state_dir.clear()


def meeting(federation: Collectives, exchange: Exchange, state_dir: SnapshotDir | None) -> Coordinator:
    """Return how the parties of a federation meet."""
    if isinstance(federation, ElasticFederation):
        return ElasticCoordinator(federation, exchange, state_dir)
    return LaunchCoordinator(federation, exchange)


def summed(
    values: Mapping[str, tuple[float, float]],
    told: Sequence[Mapping[str, list[str]]],
    federation: Collectives,
    exchange: Exchange,
    revealing: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the weighted mean over the parties of each named (value, weight) that enough of them have.

    A value that is not finite is left out, and its party named; where no party has a finite one the mean is
    NaN.

    Args:
        values: What this party has.
        told: Names of what each party has, in their order, as ``_known`` says.
        federation: The parties that meet.
        exchange: How sums are formed.
        revealing: As in ``Exchange.open``.
    """
    if exchange.is_secure and told[federation.party] != _known(values):
        raise _changed(federation.name)
    missing = _warn_of_nonfinite(told, federation)
    having = Counter(name for names in told for name in names["finite"])
    few = sorted(name for name, count in having.items() if count < exchange.min_participants)
    if few:
        log.warning(
            "[party %s] No mean of %s: fewer than %d parties have them at this moment, and each would see"
            " what the others have. Let all parties validate at the same rounds.",
            federation.name,
            ", ".join(few),
            exchange.min_participants,
        )
    names = sorted(having.keys() - few)
    if not names:
        return missing
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    for row, name in enumerate(names):
        if name in told[federation.party]["finite"]:
            value, weight = values[name]
            sums[row] = torch.tensor([value * weight, weight], dtype=torch.float64)
    sums_of = exchange.open(federation, revealing, view=json.dumps(["metrics", [*map(dict, told)]]))
    sums_of.all_reduce_each_([sums.view(-1)])
    return missing | {name: total / w for name, (total, w) in zip(names, sums.tolist(), strict=True) if w > 0}


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Say whose passport it is that cannot be read."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise MismatchError(
            f"What party {name} introduces itself with cannot be read ({error}). Install the same version of"
            " pellm-lightning at all parties."
        ) from error


def _difference(party_specs: Sequence[PartySpec], names: Sequence[str]) -> str | None:
    try:
        found = compatibility.first_difference(party_specs, names)
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"Party {names[0]} shows what party {names[1]} cannot read. Install the same version at both."
    unlike = [name for name, shown in zip(names, party_specs, strict=True) if shown["base"] is None]
    if found is None and len(unlike) == 1:
        return f"Party {unlike[0]} has check_base=False, the other has not. Give all parties the same."
    return found


def _header(name: str, words: Mapping[str, Any]) -> Header:
    """Return what a peer has said, or raise: it may have said anything."""
    purpose, round, weight = words.get("purpose"), words.get("round"), _number(words.get("weight"))
    exposed, releases = words.get("exposed", []), words.get("releases", 0)
    tag = words.get("tag", "")
    loss, distance, left = (
        _number(words.get(name), unsaid=math.nan) for name in ("loss", "distance", "steps_left")
    )
    if (
        purpose not in list(Purpose)
        or not isinstance(round, int)
        or weight is None
        or not 0 <= weight <= MAX_WEIGHT
        or not isinstance(exposed, list)
        or not isinstance(tag, str)
        or not is_count(releases)
        or loss is None
        or distance is None
        or left is None
    ):
        raise FederationError(
            f"Party {name} came to meet with {dict(words)!r:.200}, which is no purpose, round and weight"
            f" of 0 to {MAX_WEIGHT:g}. Install the same version of pellm-lightning at all parties."
        )
    fine = words.get("fine", True) is True
    return Header(
        Purpose(purpose), round, weight, fine, tag, tuple(map(str, exposed)), releases, loss, distance, left
    )


def _number(said: Any, unsaid: float | None = None) -> float | None:
    """Return a number that a peer has said, ``unsaid`` if it said none, or None if it is no such thing."""
    if said is None:
        return unsaid
    try:
        return float(said) if isinstance(said, int | float) else None
    except OverflowError:  # JSON knows whole numbers of any length
        return None


def _changed(name: str) -> FederationError:
    return FederationError(
        f"What party {name} said as it came to meet the others came back changed. A masked exchange goes by"
        " what all say, so nothing was sent. Somebody on the way changes what the parties tell each other:"
        " connect them by TLS, or by a network that you trust."
    )


def _known(values: Mapping[str, tuple[float, float]]) -> dict[str, list[str]]:
    """Return the names of the metrics that a party has: of finite values, and of others."""
    having = {metric: _can_be_summed(*both) for metric, both in sorted(values.items()) if both[1] != 0}
    return {
        "finite": [metric for metric, finite in having.items() if finite],
        "other": [metric for metric, finite in having.items() if not finite],
    }


def _can_be_summed(value: float, weight: float) -> bool:
    return 0 <= weight <= MAX_WEIGHT and abs(value * weight) <= _MAX_SUMMAND


def _warn_of_nonfinite(told: Sequence[Mapping[str, list[str]]], federation: Collectives) -> dict[str, float]:
    """Name the parties whose metrics are not finite; return NaN for each metric that is finite nowhere."""
    by_metric: dict[str, list[int]] = {}
    for party, names in enumerate(told):
        for metric in names["other"]:
            by_metric.setdefault(metric, []).append(party)
    finite = {metric for names in told for metric in names["finite"]}
    for metric, parties in sorted(by_metric.items()):
        log.warning(
            "[party %s] %s is no finite number (or its weight none) at party %s, so its mean is %s.",
            federation.name,
            metric,
            federation.called(parties),
            "that of the others" if metric in finite else "NaN",
        )
    return dict.fromkeys(sorted(by_metric.keys() - finite), math.nan)


def _names(name: str, told: Any) -> dict[str, list[str]]:
    """Return the names of the metrics that a peer has, or raise."""
    told = told or {"finite": [], "other": []}
    if (
        not isinstance(told, Mapping)
        or told.keys() != {"finite", "other"}
        or not all(isinstance(names, list) for names in told.values())
        or not all(isinstance(metric, str) for names in told.values() for metric in names)
    ):
        raise FederationError(
            f"Party {name} told {told!r:.200} for the names of its metrics. Install the same version of"
            " pellm-lightning at all parties."
        )
    return dict(told)


def _metrics(name: str, told: Any) -> dict[str, tuple[float, float]]:
    """Return the metrics that a peer has told, or raise."""
    try:
        read = {str(metric): (float(value), float(weight)) for metric, (value, weight) in told.items()}
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise FederationError(
            f"Party {name} told {told!r:.200} for its metrics, which are no pairs of a value and a weight."
            " Install the same version of pellm-lightning at all parties."
        ) from error
    for metric, (_, weight) in read.items():
        if not 0 <= weight <= MAX_WEIGHT:
            raise FederationError(
                f"Party {name} told a weight of {weight:g} for its metric {metric!r}; weights are 0 to"
                f" {MAX_WEIGHT:g}. Install the same version of pellm-lightning at all parties."
            )
    return read
