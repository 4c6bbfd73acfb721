"""One round, top to bottom: meet, pack, exchange, vote, commit."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pellm_lightning import passport
from pellm_lightning.federation import Federation, FederationError, MismatchError
from pellm_lightning.layout import Chunk, Layout

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]


class Purpose(IntEnum):
    """Why a party comes to meet the others."""

    ROUND = 1
    METRICS = 2
    DONE = 3


@dataclass(frozen=True)
class Header:
    """What a party says before anything else crosses; the same few numbers whatever follows."""

    purpose: Purpose
    round: int
    weight: float


@dataclass(frozen=True)
class Ballot:
    """What the parties say when each has seen all its values."""

    fine: list[bool]
    """Party by party, whether all its values are finite."""
    loss: float | None
    """Mean of the parties' training losses, weighted; None if no party gave one."""


@dataclass(frozen=True)
class RoundReport:
    """What a round did, seen from one party."""

    round: int
    """Index of the round, from 0."""
    active_parties: int
    """Parties whose parameters counted: weight above 0 and all values finite."""
    total_weight: float
    """Sum of the weights that counted."""
    weight: float
    """This party's weight, 0 if it did not count."""
    excluded: tuple[int, ...]
    """Parties left out because their parameters held NaN or infinity; the result has healed them."""
    loss: float | None
    """Mean of the parties' local training losses, weighted; None if no party gave one."""
    seconds: float
    """Seconds from the moment all parties had arrived until the parameters were written."""
    waited_seconds: float
    """Seconds this party waited for the others to arrive."""
    bytes_sent: int
    """Bytes this party handed to the group."""
    update_norm: float
    """2-norm of this party's update: its parameters minus the anchor."""
    distance: float
    """2-norm of this party's parameters minus the weighted mean."""


def _sgd_one(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


class Aggregator:
    """Average named tensors over a federation, round by round, in place.

    The update of party i is exchanged as ``w_i / sum(w) * (anchor - x_i)`` in float32; the sum over the
    parties is the pseudo-gradient, and one step of the outer optimizer on the global vector (float32) gives
    what all parties write back. With ``SGD(lr=1)`` that is FedAvg, ``x = sum(w_i x_i) / sum(w)`` (McMahan et
    al. 2017, arXiv:1602.05629): test_weighted_mean_equals_float64. What no party moved keeps its bits.

    Every party must own one, call ``start()``, then ``step()`` once a round; a party that is through calls
    ``drain()`` so that the others can go on. A failed round leaves the parameters as they were.

    Args:
        federation: The joined parties.
        parameters: Named floating-point tensors on one device; the same names, shapes and dtypes at every
            party.
        outer_optimizer: Makes the optimizer of the global vector, one flat float32 parameter of shape (D,).
        frozen: Named tensors that stay local but must be the same everywhere (the base model); compared by
            sample.
        config: Settings that must be equal at all parties, by name; compared at the start.
        files: Paths this party writes to ("host:path"), which no other party may share.
        on_nonfinite: What to do when a party's parameters hold NaN or infinity: leave it out of the round
            (the result heals it), or raise at every party.

    Raises:
        ValueError: If the parameters cannot be laid out as one float32 vector.
    """

    def __init__(
        self,
        federation: Federation,
        parameters: Mapping[str, Tensor],
        *,
        outer_optimizer: OptimizerFactory = _sgd_one,
        frozen: Mapping[str, Tensor] | None = None,
        config: Mapping[str, str | int | float | None] | None = None,
        files: Iterable[str] = (),
        on_nonfinite: Literal["exclude", "raise"] = "exclude",
    ) -> None:
        self.federation = federation
        self.round = 0
        self._layout = Layout(parameters)
        self._frozen = frozen
        self._config = dict(config or {})
        self._files = list(files)
        self._on_nonfinite = on_nonfinite
        self._global = nn.Parameter(self._layout.pack_(self._layout.new_vector()))
        self._outer_optimizer = outer_optimizer([self._global])
        # The parties' ballot follows the vector: a flag each, and the loss with its weight.
        self._staging = self._layout.new_vector(extra=federation.num_parties + 2)
        self._scratch = self._layout.new_scratch()
        self._scratch2 = torch.empty_like(self._scratch)
        self._resumed = False
        self._started = False
        self._config.setdefault("on_nonfinite", on_nonfinite)
        self._config.setdefault("outer_optimizer", _describe(self._outer_optimizer))

    @property
    def size_bytes(self) -> int:
        """Bytes of the vector that each round exchanges."""
        return 4 * self._layout.size

    @property
    def global_vector(self) -> Tensor:
        """The global vector of shape (D,), float32: what every party's parameters hold after a round."""
        return self._global.detach()

    # ---- what a party calls

    @torch.no_grad()
    def start(self) -> None:
        """Compare what all parties must share, then take over party 0's parameters.

        With a loaded state, every party keeps its own parameters instead and goes on from there.

        Raises:
            MismatchError: If parties differ; every party raises it, and no parameter was touched.
        """
        self.federation.enter("starting")
        passports = self.federation.all_gather_json("passport", self._passport())
        difference = passport.first_difference(passports)
        if difference:
            raise MismatchError(difference)
        if not self._resumed:
            self.federation.broadcast_(self._global.data)
            self._layout.unpack_(self._global.data)
        self._started = True

    @torch.no_grad()
    def step(self, weight: float, loss: float | None = None) -> RoundReport:
        """Run one round with all parties.

        Args:
            weight: How much this party counts, finite and >= 0; 0 sends zeros, yet receives the result.
            loss: Mean training loss of this party since the last round, for the report.

        Raises:
            ValueError: If the weight is negative or not finite.
            MismatchError: If a party is in another round.
            PartyLostError: If a party is gone or too late.
            FederationError: If no party counts.
        """
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"Party {self.federation.party} has weight={weight}; it must be finite and >= 0."
            )
        coming = self._now()
        headers = self._meet(Purpose.ROUND, weight)
        return self._round(headers, loss, coming)

    @torch.no_grad()
    def drain(self) -> Iterator[RoundReport]:
        """Answer the others' rounds with weight 0 until no party is active; yield each round's report.

        Call it when this party has made its last step, and exhaust it: all parties end with the same
        parameters.
        """
        while True:
            coming = self._now()
            headers = self._meet(Purpose.DONE)
            if all(header.purpose is Purpose.DONE for header in headers):
                return
            yield self._round(headers, None, coming)

    def mean(self, values: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Return the weighted mean over the parties of each named (value, weight), equal on all parties.

        A party that is elsewhere (in a round, or done) counts 0, and so does one that lacks a name.
        """
        self._meet(Purpose.METRICS)
        return self._mean(values)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain containers; resuming from it is exact."""
        return {
            "round": self.round,
            "shapes": self._layout.shapes,
            "global": self._global.detach().clone(),
            "outer_optimizer": copy.deepcopy(self._outer_optimizer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``; call it before ``start()``.

        Raises:
            ValueError: If the state is of other parameters.
        """
        saved, ours = state["shapes"], self._layout.shapes
        if saved != ours:
            differ = sorted(name for name in {*saved, *ours} if saved.get(name) != ours.get(name))
            first = f"the first that differs is {differ[0]!r}" if differ else "their order differs"
            raise ValueError(
                f"The checkpoint's federated state is of {len(saved)} parameters, this module trains"
                f" {len(ours)}; {first}. Resume with the model, PEFT configuration and include and exclude"
                " patterns of the checkpoint."
            )
        self.round = state["round"]
        with torch.no_grad():
            self._global.copy_(state["global"])
        # A copy, since the optimizer goes on in the very tensors that it is given.
        self._outer_optimizer.load_state_dict(copy.deepcopy(state["outer_optimizer"]))
        self._resumed = True

    # ---- the round

    def _round(self, headers: list[Header], loss: float | None, coming: tuple[float, int]) -> RoundReport:
        came, sent_before = coming
        arrived, _ = self._now()
        weights = self._weights(headers)
        update_norm, ballot = self._exchange(weights, loss)
        excluded = [party for party, fine in enumerate(ballot.fine) if not fine and weights[party] > 0]
        if excluded:
            weights = self._without(excluded, weights)
            self._exchange(weights, loss)
        distance = self._commit()
        report = RoundReport(
            round=self.round,
            active_parties=sum(weight > 0 for weight in weights),
            total_weight=sum(weights),
            weight=weights[self.federation.party],
            excluded=tuple(excluded),
            loss=ballot.loss,
            seconds=time.perf_counter() - arrived,
            waited_seconds=arrived - came,
            bytes_sent=self.federation.bytes_sent - sent_before,
            update_norm=update_norm,
            distance=distance,
        )
        self.federation.enter(f"training after round {self.round}")
        self.round += 1
        return report

    def _meet(self, purpose: Purpose, weight: float = 0.0) -> list[Header]:
        """Wait for all parties and learn why each came; help those that came for metrics first.

        Parties are uneven: one validates while another is already in its next round. Every header has the
        same size, so they can meet anywhere, and whoever came for something else meets again afterwards.
        """
        if not self._started:
            raise FederationError(
                f"Party {self.federation.party} comes to a round before the parties have agreed on what they"
                " share. Call start() first, at every party."
            )
        while True:
            self.federation.enter(f"meeting for round {self.round}")
            headers = self._call(Header(purpose, self.round, weight))
            if purpose is Purpose.METRICS or all(header.purpose is not Purpose.METRICS for header in headers):
                self.federation.enter(f"in round {self.round}")
                return headers
            self._mean({})

    def _call(self, mine: Header) -> list[Header]:
        rows = torch.zeros(self.federation.num_parties, 3, dtype=torch.float64)
        rows[self.federation.party] = torch.tensor(
            [mine.purpose, mine.round, mine.weight], dtype=torch.float64
        )
        self.federation.all_reduce_(rows)
        return [
            Header(Purpose(int(purpose)), int(number), weight) for purpose, number, weight in rows.tolist()
        ]

    def _weights(self, headers: list[Header]) -> list[float]:
        rounds = [header.round for header in headers]
        if len(set(rounds)) > 1:
            raise MismatchError(
                f"The parties are in different rounds ({_by_party(rounds)}). They must start together: resume"
                " all from checkpoints of the same round."
            )
        weights = [header.weight for header in headers]
        # Where others are done, a party of weight 0 may be the last one active: then nothing moves.
        if sum(weights) == 0 and all(header.purpose is Purpose.ROUND for header in headers):
            raise FederationError(
                f"No party has weight above 0 in round {self.round}, so there is no mean. With"
                " weighting='samples' this means that no party consumed a training sample: check the data of"
                " each party."
            )
        return weights

    def _exchange(self, weights: list[float], loss: float | None) -> tuple[float, Ballot]:
        """Fill the staging vector with the mean of ``anchor - x``; return the norm of this party's update.

        Behind the last bucket rides the ballot: what each party has to say once it has seen all its values.
        """
        total = sum(weights)
        share = weights[self.federation.party] / total if total else 0.0
        squares: list[float] = []

        def packed() -> Iterator[Tensor]:
            *buckets, last = self._layout.buckets()
            for bucket in buckets:
                squares.extend(self._pack(bucket, share))
                yield self._staging[bucket[0].start : bucket[-1].stop]
            squares.extend(self._pack(last, share))
            self._cast(self._norm(squares), loss, share)
            yield self._staging[last[0].start :]

        self.federation.all_reduce_each_(packed())
        return self._norm(squares), self._counted()

    def _pack(self, bucket: list[Chunk], share: float) -> Iterator[float]:
        for chunk in bucket:
            update = self._staging[chunk.start : chunk.stop]
            anchor = chunk.as_written(self._global[chunk.start : chunk.stop], self._scratch[: chunk.size])
            chunk.subtracted_from(anchor, out=update)
            yield _squared_norm(update)
            if share > 0:
                update.mul_(share)
            else:
                update.zero_()  # and not a product: 0 * nan is nan

    def _cast(self, update_norm: float, loss: float | None, share: float) -> None:
        """Write this party's ballot: whether its values are finite, and its share of the mean loss."""
        fine = math.isfinite(update_norm)
        known = share > 0 and loss is not None and math.isfinite(loss)
        mine = [
            float(party == self.federation.party and fine) for party in range(self.federation.num_parties)
        ]
        mine += [share * loss if known and loss is not None else 0.0, share if known else 0.0]
        self._staging[self._layout.size :] = torch.tensor(mine, dtype=torch.float32)

    def _counted(self) -> Ballot:
        *fine, loss, share = self._staging[self._layout.size :].tolist()
        return Ballot([vote == 1.0 for vote in fine], loss / share if share else None)

    def _without(self, excluded: list[int], weights: list[float]) -> list[float]:
        """Return the weights without those whose values are not finite, or raise at every party."""
        here = ""
        if self.federation.party in excluded:
            name = self._layout.first_nonfinite()
            here = (
                f" Here the first such parameter is {name!r}." if name else " Here an update exceeds float32."
            )
        message = (
            f"Round {self.round}: the parameters of party {_listed(excluded)} hold NaN or infinity.{here}"
        )
        rest = [0.0 if party in excluded else weight for party, weight in enumerate(weights)]
        cure = " Lower that party's learning rate, clip its gradients, or look at its data."
        if self._on_nonfinite == "raise" or sum(rest) == 0:
            raise FederationError(message + " No parameter was changed." + cure)
        log.warning(
            "[party %d] %s It counts 0 in this round and takes over the result.%s",
            self.federation.party,
            message,
            cure,
        )
        return rest

    def _commit(self) -> float:
        """Step the outer optimizer by the pseudo-gradient, write back; return the distance from the mean."""
        plain = _is_sgd_one(self._outer_optimizer)
        squares: list[float] = []
        for chunk in self._layout.chunks():
            at = slice(chunk.start, chunk.stop)
            pseudo_gradient, global_ = self._staging[at], self._global.data[at]
            if plain and not chunk.rounds:  # in place, while the chunk is in the cache
                mean = global_.sub_(pseudo_gradient)
            else:
                mean = self._scratch2[: chunk.size]
                torch.sub(chunk.as_written(global_, mean), pseudo_gradient, out=mean)
            away = chunk.subtracted_from(mean, out=self._scratch[: chunk.size])
            squares.append(_squared_norm(away))
            if plain:  # bit for bit what SGD(lr=1) does
                chunk.scatter_(global_.sub_(pseudo_gradient) if chunk.rounds else global_)
        if not plain:
            self._global.grad = self._staging[: self._layout.size]
            self._outer_optimizer.step()
            self._global.grad = None
            self._layout.unpack_(self._global.data)
        return self._norm(squares)

    # ---- small parts

    def _now(self) -> tuple[float, int]:
        return time.perf_counter(), self.federation.bytes_sent

    @staticmethod
    def _norm(squares: list[float]) -> float:
        return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan

    def _mean(self, values: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        known = self.federation.all_gather_json("metrics", sorted(values))
        names = sorted({name for party_names in known for name in party_names})
        sums = torch.zeros(len(names), 2, dtype=torch.float64)
        for row, name in enumerate(names):
            value, weight = values.get(name, (0.0, 0.0))
            if weight > 0:
                sums[row] = torch.tensor([value * weight, weight], dtype=torch.float64)
        self.federation.all_reduce_(sums)
        return {name: total / w for name, (total, w) in zip(names, sums.tolist(), strict=True) if w > 0}

    def _passport(self) -> passport.Passport:
        return {
            "protocol": passport.PROTOCOL,
            "schema": self._layout.schema,
            "config": self._config,
            "base": None if self._frozen is None else passport.base_digests(self._frozen),
            "round": self.round,
            "checksum": passport.checksum(self._global.data) if self._resumed else None,
            "files": self._files,
        }


def _squared_norm(values: Tensor) -> float:
    squared = float(torch.dot(values, values))
    # Squares of large finite values overflow float32; those of infinite ones float64, too.
    return squared if math.isfinite(squared) else float(values.double().square().sum())


def _is_sgd_one(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is ``x -= grad`` and nothing else."""
    (group,) = optimizer.param_groups
    return type(optimizer) is torch.optim.SGD and (
        group["lr"], group["momentum"], group["weight_decay"], group["maximize"]
    ) == (1.0, 0, 0, False)  # fmt: skip


def _describe(optimizer: torch.optim.Optimizer) -> str:
    group = optimizer.param_groups[0]
    settings = ", ".join(f"{key}={group[key]}" for key in sorted(group) if key != "params")
    return f"{type(optimizer).__name__}({settings})"


def _by_party(values: list[int]) -> str:
    return ", ".join(f"party {party}: {value}" for party, value in enumerate(values))


def _listed(parties: list[int]) -> str:
    return ", ".join(map(str, parties))
