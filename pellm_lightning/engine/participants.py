"""ParticipantFilter: which parties' updates are summed in a round, and with which weights."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pellm_lightning.aggregation import influence
from pellm_lightning.aggregation.base import RoundContext
from pellm_lightning.comm import Collectives, FaultyPartyError, FederationError, MismatchError
from pellm_lightning.engine.context import EngineContext
from pellm_lightning.engine.coordination import Header, Purpose

log = logging.getLogger(__name__)

# A party that was healed of NaN, or came back, trains in the next round; if too few do even then, it is no
# accident.
_MAX_SHORT_ROUNDS = 2


@dataclass(frozen=True)
class Participants:
    """Selection of the parties of one round; the same at every party.

    Args:
        weights: Weight of each party that meets, in their order; 0 for who does not count. Where the exchange
            hides weights, 1 for who counts.
        trained: Who has trained, by index, whatever its weight.
        excluded: Whose values are not finite, or absurdly large, by index.

    Example:
        >>> Participants(weights=[8.0, 0.0, 4.0], trained=[0, 2], excluded=[1])
        Participants(weights=[8.0, 0.0, 4.0], trained=[0, 2], excluded=[1])
    """

    weights: list[float]
    trained: list[int]
    excluded: list[int]


class ParticipantFilter:
    """Filter of the parties that count in a round, by their headers; every party comes to the same result.

    Args:
        context: The exchange, privacy and quorum of the aggregator.
    """

    def __init__(self, context: EngineContext) -> None:
        self._federation = context.federation
        self._is_secure = context.exchange.is_secure
        self._private = context.privacy
        self._on_nonfinite = context.on_nonfinite
        self._min_participants = context.min_participants
        self._fragments = context.fragments
        self._max_share = context.max_share
        self.quorum = context.quorum

    def select(
        self, headers: Sequence[Header], round: int, failed: int, first_nonfinite: Callable[[], str | None]
    ) -> Participants:
        """Return who takes part in a round, as far as the headers tell.

        Args:
            headers: What the parties said as they came.
            round: The round.
            failed: Noisy releases of attempts at this round that failed.
            first_nonfinite: Returns the name of this party's first parameter that is not finite, if any.

        Raises:
            MismatchError: If a party is in another round.
            FederationError: If nobody counts although all train, or ``on_nonfinite="raise"`` applies.
        """
        said = self._weights(headers, round)
        excluded = [party for party, header in enumerate(headers) if not header.fine]
        if excluded:
            said = self._without(excluded, said, self._nonfinite(excluded, round, first_nonfinite()))
        weights = self._sendable(headers, said, round)
        trained = self._trained(headers, said, weights, excluded)
        return Participants(self._allowed(weights, trained, round, failed), trained, excluded)

    def exclude(
        self,
        selected: Participants,
        fine: Sequence[bool],
        round: int,
        first: Callable[[], str | None],
        norms: Sequence[float] = (),
    ) -> Participants:
        """Return the participants without those whose values have turned out not to be finite, or absurd.

        Args:
            selected: As selected by the headers.
            fine: Party by party, whether all its values were finite.
            round: The round.
            first: As in ``select``.
            norms: Party by party, the norm of its update; empty where these are hidden.

        Raises:
            FederationError: If ``on_nonfinite="raise"`` applies, nobody is left, or the exchange is secure.
        """
        weights = selected.weights
        late = [party for party, is_fine in enumerate(fine) if not is_fine and weights[party] > 0]
        judged = [party for party, weight in enumerate(weights) if norms and weight > 0 and party not in late]
        absurd = [judged[k] for k in influence.absurd([norms[party] for party in judged])]
        if not late and not absurd:
            return selected
        if late:
            weights = self._without(late, weights, self._nonfinite(late, round, first()))
        if absurd:
            weights = self._without(absurd, weights, self._absurd(absurd, round, norms))
        late = sorted([*late, *absurd])
        if self._is_secure:  # the difference of two sums would be what was left out
            raise FederationError(
                f"Round {round}: an update of party {self._federation.called(late)} exceeds"
                " float32. No parameter was changed. Lower that party's learning rate."
            )
        trained = [party for party in selected.trained if party not in late]
        excluded = sorted([*selected.excluded, *late])
        return Participants(self._in_quorum(weights, trained), trained, excluded)

    # ---- the single rules

    def _weights(self, headers: Sequence[Header], round: int) -> list[float]:
        """Return the weights that the parties came with.

        Raises:
            MismatchError: If a party is in another round.
            FaultyPartyError: If most are in one round, and can continue without the others.
            FederationError: If all train, and none counts.
        """
        rounds = [header.round for header in headers if not header.behind]
        if len(set(rounds)) > 1:
            said = (
                f"The parties are in different rounds ({_by_party(rounds)}). They must start together: resume"
                " all from checkpoints of the same round."
            )
            most, count = Counter(rounds).most_common(1)[0]
            if self._federation.may_lose_parties and 2 * count > len(rounds):
                others = [p for p, header in enumerate(headers) if not header.behind and header.round != most]
                raise FaultyPartyError(said, parties=[self._federation.names[party] for party in others])
            raise MismatchError(said)
        weights = [0.0 if header.behind else header.weight for header in headers]
        # Where others are done, a party of weight 0 may be the last one active: then nothing moves.
        all_train = all(header.purpose is Purpose.ROUND and not header.behind for header in headers)
        if sum(weights) == 0 and all_train and all(header.fine for header in headers):
            raise FederationError(
                f"No party has weight above 0 in round {round}, so there is no mean. With"
                " weighting='samples' this means that no party consumed a training sample: check the data of"
                " each party."
            )
        return weights

    def _nonfinite(self, excluded: Sequence[int], round: int, first: str | None) -> str:
        """Return what is wrong with parties whose values are not finite."""
        who, here = self._federation.called(excluded), ""
        if self._federation.party in excluded:
            here = " Here an update exceeds float32."
            if first:
                here = f" Here the first such parameter is {first!r}."
        return f"Round {round}: the parameters of party {who} hold NaN or infinity.{here}"

    def _absurd(self, excluded: Sequence[int], round: int, norms: Sequence[float]) -> str:
        """Return what is wrong with parties whose updates are out of all proportion."""
        sizes = ", ".join(f"{norms[party]:.3g}" for party in excluded)
        return (
            f"Round {round}: the update of party {self._federation.called(excluded)} has norm {sizes},"
            f" {influence.ABSURD:g} times the median of the others' or more."
        )

    def _without(self, excluded: Sequence[int], weights: Sequence[float], message: str) -> list[float]:
        """Return the weights without those of which ``message`` says what is wrong.

        Raises:
            FederationError: If ``on_nonfinite="raise"`` applies, or nobody is left.
        """
        federation = self._federation
        rest = [0.0 if party in excluded else weight for party, weight in enumerate(weights)]
        cure = " Lower that party's learning rate, clip its gradients, or look at its data."
        if self._on_nonfinite == "raise" or sum(rest) == 0:
            raise FederationError(message + " No parameter was changed." + cure)
        log.warning(
            "[party %s] %s It counts 0 in this round and receives the result.%s",
            federation.name,
            message,
            cure,
        )
        return rest

    def _sendable(self, headers: Sequence[Header], weights: Sequence[float], round: int) -> list[float]:
        """Return the weights without those whose values were revealed in a sum of others."""
        federation = self._federation
        together = _counting_together(headers, weights, federation.names)
        exposed = weights[federation.party] > 0 and federation.party not in together
        if exposed:
            log.warning(
                "[party %s] Round %d: a sum of this party's update was revealed in an attempt that failed. It"
                " is not sent again in a sum of others, which would tell the parties apart: this party counts"
                " 0 and receives the result.",
                federation.name,
                round,
            )
        return [weight if party in together else 0.0 for party, weight in enumerate(weights)]

    def _trained(
        self,
        headers: Sequence[Header],
        said: Sequence[float],
        sendable: Sequence[float],
        excluded: Collection[int],
    ) -> list[int]:
        """Return who has trained in a round, whatever weight it was given, by index."""
        return [
            party
            for party, header in enumerate(headers)
            if header.purpose is Purpose.ROUND
            and not header.behind
            and party not in excluded
            and (said[party] == 0 or sendable[party] > 0)
        ]

    def _allowed(
        self, weights: Sequence[float], trained: Sequence[int], round: int, failed: int
    ) -> list[float]:
        """Return the weights; all 0 if too few trained or could hide in a sum, or the budget is spent."""
        federation, count = self._federation, sum(weight > 0 for weight in weights)
        if count and self._private is not None and not self._private.within_budget(failed):
            log.warning(
                "[party %s] Round %d: one more would exceed max_epsilon=%g. Nothing is sent; all go back to"
                " the last global parameters.",
                federation.name,
                round,
                self._private.mechanism.max_epsilon,
            )
            return [0.0] * len(weights)
        if 0 < count < self._min_participants:
            log.warning(
                "[party %s] Round %d: only %d parties count, and each would see what the others sent."
                " Nothing is sent; all go back to the last global parameters.",
                federation.name,
                round,
                count,
            )
            return [0.0] * len(weights)
        return self._in_quorum(weights, trained)

    def _in_quorum(self, weights: Sequence[float], trained: Sequence[int]) -> list[float]:
        """Return the weights, capped; all 0 if fewer than a quorum have trained."""
        if len(trained) < self.quorum:
            return [0.0] * len(weights)
        if self._max_share is None or self._is_secure:  # who hides its weight caps it itself
            return list(weights)
        return influence.capped(weights, self._max_share)

    # ---- shares

    def round_context(
        self, sums: Collectives, weights: Sequence[float], own_weight: float, round: int
    ) -> RoundContext:
        """Return the shares; where weights are hidden, this party's weight itself, and NaN of the others."""
        if self._is_secure:
            shares = [math.nan if weight else 0.0 for weight in weights]
            if weights[sums.party]:
                shares[sums.party] = own_weight
        else:
            total = sum(weights)
            shares = [weight / total if total else 0.0 for weight in weights]
        return RoundContext(sums, shares, round)

    @staticmethod
    def normalized(counting: RoundContext, total_weight: float) -> RoundContext:
        """Return the shares, once the total of the hidden weights is known.

        Raises:
            FederationError: If some count, yet all together weigh nothing.
        """
        if counting.num_participants and total_weight <= 0:
            raise FederationError(
                f"The weights of round {counting.round} are too small for the fractional bits of secure"
                " aggregation: their sum is 0. Give larger weights, or a larger fractional_bits."
            )
        shares = [share / total_weight if share else 0.0 for share in counting.shares]
        return RoundContext(counting.federation, shares, counting.round)

    # ---- the end

    def is_last(self, headers: Sequence[Header], round: int, shortage: "Shortage") -> bool:
        """Tell whether no further round can move anything after the present one.

        Args:
            headers: What the parties said as they came to it.
            round: Its index.
            shortage: Whether too few trained in it.
        """
        federation = self._federation
        if self._private is not None and not self._private.within_budget():
            log.warning(
                "[party %s] Round %d is the last: one more would exceed max_epsilon=%g.",
                federation.name,
                round,
                self._private.mechanism.max_epsilon,
            )
            return True
        done = sum(header.purpose is Purpose.DONE for header in headers)
        left = federation.max_parties - done
        if shortage.rounds:
            ends = left < self.quorum or shortage.rounds >= _MAX_SHORT_ROUNDS
            log.warning("[party %s] %s", federation.name, self._explained(headers, round, shortage, ends))
            return ends
        if not done or left >= self._min_participants:
            return False
        log.warning(
            "[party %s] Round %d is the last: %d parties have made all their steps, and the %d that have not"
            " are too few to hide in a sum. Give all parties equally many rounds, by every_n_steps and"
            " max_steps, if the others' steps shall count.",
            federation.name,
            round,
            done,
            left,
        )
        return True

    def _explained(self, headers: Sequence[Header], round: int, shortage: "Shortage", ends: bool) -> str:
        """Return why a round that fewer than a quorum trained in moved nothing, and what comes of it."""
        federation, trained = self._federation, shortage.trained
        who = f" (party {federation.called(trained)})" if trained else ""
        since = round - shortage.rounds * self._fragments
        result = f"the result of round {since}" if since >= 0 else "the parameters of the start"
        said = (
            f"Round {round}: {len(trained)} of {federation.max_parties} parties trained in it{who}, but"
            f" quorum={self.quorum}, so it moves nothing and all go back to {result}."
        )
        idle = [
            f"party {federation.called([party])} {why}"
            for party, header in enumerate(headers)
            if party not in trained and (why := _why_idle(header, party in shortage.excluded))
        ]
        if idle:
            said += f" The others: {', '.join(idle)}."
        if not ends:
            return f"{said} The local steps since then are lost, the federation continues."
        stopping = [party for party, header in enumerate(headers) if header.purpose is not Purpose.DONE]
        stops = ", ".join(
            f"party {federation.called([party])} stops with {_steps(shortage.steps_left[party])} left"
            for party in stopping
        )
        return (
            f"{said} The federation ends with that result: {stops}. To use these steps too, give all parties"
            " equally many rounds, by every_n_epochs and the same max_epochs or by the same max_steps;"
            " quorum=1 would let the last party that still trains decide the result alone."
        )


@dataclass(frozen=True)
class Shortage:
    """Shortage of parties that train: what a round with too few of them needs to be reported.

    Args:
        rounds: Rounds of this fragment in a row, the present one included, in which fewer than a quorum
            trained; 0 if it had enough.
        trained: Who trained in the present one, by index.
        excluded: Whose values were not finite, by index.
        steps_left: Optimizer steps that each party still has to make; NaN where that is unknown here.

    Example:
        >>> Shortage(rounds=1, trained=[0], excluded=[], steps_left=[12.0, math.nan]).rounds
        1
    """

    rounds: int
    trained: Sequence[int]
    excluded: Sequence[int]
    steps_left: Sequence[float]


def _why_idle(header: Header, excluded: bool) -> str | None:
    """Return why a party did not train in a round, None if nobody knows."""
    if header.purpose is Purpose.DONE:
        return "has made all its steps"
    if excluded or not header.fine:
        return "holds NaN or infinity" + (" or sent an absurdly large update" if header.fine else "")
    return "has just come (back)" if header.behind or header.purpose is Purpose.JOIN else None


def _steps(left: float) -> str:
    return f"about {left:.0f} steps" if math.isfinite(left) else "an unknown number of steps"


def _counting_together(headers: Sequence[Header], weights: Sequence[float], names: Sequence[str]) -> set[int]:
    """Return who counts, less those whose values were revealed in a sum of others than all these."""
    together = {party for party, weight in enumerate(weights) if weight > 0}
    while True:
        sum_ = {headers[party].values_of(names[party]) for party in together}
        revealed = {
            party for party in together if headers[party].exposed and {*headers[party].exposed} != sum_
        }
        if not revealed:
            return together
        together -= revealed


def _by_party(values: Sequence[int]) -> str:
    return ", ".join(f"party {party}: {value}" for party, value in enumerate(values))
