"""Masked sums between separate jobs: whoever dies when, nobody learns what a single party has.

The transcripts of all attempts at a round are put together, with every key that was revealed. Whatever sum
of updates comes to light that way is one linear equation; a curious party adds its own update. No update of
another may follow from them.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from certificates import tls_of
from job_threads import Act, Life, World, die
from round_history import SIZE, noise
from secure_exchange import keys, masked, signing_key_of
from torch import Tensor

from pellm_lightning import FederationError
from pellm_lightning.comm.signing_keys import TrustedKeys
from pellm_lightning.exchange import SecureAggregation
from pellm_lightning.exchange.secure.fixed_point import KEY_BYTES, FixedPoint, KeyStream

DIGITS = 24
BALLOT = 3
"""How many numbers follow the parties' flags behind a vector."""


@dataclass
class Attempt:
    """What left the parties in one attempt, by the members and the round."""

    members: tuple[str, ...]
    round: int
    masked: dict[str, Tensor] = field(default_factory=dict)
    """What each party sent of its update."""
    revealed: dict[str, bytes] = field(default_factory=dict)
    """The keys of own masks that parties have given away."""


class Transcript:
    """Everything that crosses between the parties, put together from what each of them sends."""

    def __init__(self) -> None:
        self.attempts: dict[tuple[int, str], Attempt] = {}
        self.stages: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def listening(self) -> Act:
        """Return what begins to note all that a party sends, and passes points before and after each step."""

        def listen(life: Life) -> None:
            federation: Any = life.federation
            send = federation.all_reduce_
            stage = "keys"

            def sends(x: Tensor) -> Tensor:
                nonlocal stage
                stage = self._stage(x, len(federation.names))
                self._note(life, stage, x)
                life.reach(f"{stage}:before")
                summed = send(x)
                life.reach(f"{stage}:after")
                return summed

            federation.all_reduce_ = sends

        return listen

    @staticmethod
    def _stage(x: Tensor, parties: int) -> str:
        if x.shape == (parties, KEY_BYTES // 8):
            return "reveal"
        if x.shape == (parties, 4):
            return "keys"
        if x.shape == (parties, 8):
            return "signatures"
        if x.numel() == 1:
            return "confirmation"
        return "sum"

    def _note(self, life: Life, stage: str, x: Tensor) -> None:
        federation: Any = life.federation
        assert not x.is_floating_point(), "an open number between parties"
        epoch = (federation._current_view.attempt, ",".join(federation.names))
        with self._lock:
            self.stages.append((life.name, stage))
            round = life.aggregator.round if life.aggregator is not None else 0
            attempt = self.attempts.setdefault(epoch, Attempt(tuple(federation.names), round))
            if stage == "sum" and x.numel() == SIZE:
                attempt.masked[life.name] = x.clone()
            if stage == "reveal":
                attempt.revealed[life.name] = x[federation.party].numpy().tobytes()

    def sums(self) -> list[tuple[Attempt, Tensor]]:
        """Return what whoever has seen everything can read: attempts of which all keys were revealed."""
        read = []
        for attempt in self.attempts.values():
            if attempt.masked.keys() == set(attempt.members) == attempt.revealed.keys():
                total = torch.stack(list(attempt.masked.values())).sum(0)
                value = torch.empty(SIZE, dtype=torch.float64)
                # The vector comes first in each party's stream.
                masks = [KeyStream(key) for key in attempt.revealed.values()]
                FixedPoint(64, DIGITS, len(attempt.members)).decode_(total, value, masks)
                read.append((attempt, value))
        return read


def update(name: str, round: int) -> Tensor:
    """What local training makes of a party's parameters: anchor minus that; weights are 1."""
    return -noise(int(name[1:]), round).double()


Told = list[tuple[int, tuple[str, ...]]]


def told(transcript: Transcript, roster: Sequence[str]) -> Told:
    """Return the round of each sum that came to light, and whose updates it is of."""
    found = []
    nothing = torch.zeros(SIZE, dtype=torch.float64)
    for attempt, value in transcript.sums():
        subsets = [s for n in range(len(roster) + 1) for s in combinations(roster, n)]
        matching = [
            some
            for some in subsets
            if torch.allclose(
                value, torch.stack([nothing, *(update(p, attempt.round) for p in some)]).sum(0), atol=1e-5
            )
        ]
        assert len(matching) == 1, "a sum is of some parties' updates, each once"
        found.append((attempt.round, matching[0]))
    return sorted(found)


def assert_nobody_is_told_apart(transcript: Transcript, roster: Sequence[str]) -> Told:
    """See that no single update follows from the sums that came to light; return these."""
    found = told(transcript, roster)
    for round in {number for number, _ in found}:
        sums = [[name in of_sum for name in roster] for number, of_sum in found if number == round]
        for curious in range(len(roster)):
            own = np.eye(len(roster))[curious]
            knows = np.vstack([np.array(sums, float), own])
            for other in set(range(len(roster))) - {curious}:
                wanted = np.vstack([knows, np.eye(len(roster))[other]])
                assert np.linalg.matrix_rank(wanted) > np.linalg.matrix_rank(knows), (roster[other], found)
    return found


def started(
    w: World, transcript: Transcript, faults: Mapping[str, Mapping[str, Act]] | None = None, **arguments: Any
) -> None:
    """Start all parties, each of weight 1, and note what they send once they have joined."""
    arguments = {"weight": 1.0, "exchange": masked(fractional_bits=DIGITS)} | arguments
    for name in w.roster:
        own = {"started": transcript.listening(), **(faults or {}).get(name, {})}
        w.start(name, faults=own, **arguments)


# ---- nobody is lost


def test_rounds_equal_their_replay(world: Callable[..., World]) -> None:
    w, transcript = world(4, rounds=3, quorum=3), Transcript()
    started(w, transcript)
    w.join()
    assert w.judged().rounds == 3
    everybody = tuple(w.roster)
    assert assert_nobody_is_told_apart(transcript, w.roster) == [(r, everybody) for r in range(3)]
    per_round = ["keys", "signatures", "sum", "sum", "confirmation", "reveal"]
    for name in w.roster:
        assert [stage for who, stage in transcript.stages if who == name] == per_round * 3


def test_the_certificates_of_tls_are_keys_enough(world: Callable[..., World]) -> None:
    w, transcript = world(4, rounds=2, quorum=3, tls=tls_of), Transcript()
    started(w, transcript, exchange=SecureAggregation(fractional_bits=DIGITS))
    w.join()
    assert w.judged().rounds == 2
    everybody = tuple(w.roster)
    assert assert_nobody_is_told_apart(transcript, w.roster) == [(r, everybody) for r in range(2)]


def test_metrics_are_sums_too(world: Callable[..., World]) -> None:
    w, transcript = world(3, rounds=2, quorum=3), Transcript()
    means: dict[str, dict[str, float]] = {}

    def asks(life: Life) -> None:
        assert life.aggregator is not None
        mine = {"loss": (1000.0 + life.index, 1.0 + life.index)} | ({"one": (7.0, 1.0)} if life.index else {})
        means[life.name] = life.aggregator.mean(mine)

    started(w, transcript, {name: {"training@1": asks} for name in w.roster})
    w.join()
    w.judged()
    # (1000 * 1 + 1001 * 2 + 1002 * 3) / 6; "one" two have, so nobody hears of it.
    assert means["p0"].keys() == {"loss"}
    assert means["p0"]["loss"] == pytest.approx(6008 / 6, abs=1e-5)
    assert len({str(mean) for mean in means.values()}) == 1
    assert not any(b"1000" in value or b"1001" in value for value in w.rendezvous.values("").values())


# ---- somebody is lost

POINTS = ["keys:before", "signatures:before", "sum:before", "confirmation:before", "confirmation:after"]
POINTS += ["reveal:after", "voting"]
"""What a party is about to do, or has done; it votes when it has counted the round already."""


@pytest.mark.parametrize("point", POINTS)
def test_a_party_is_killed_at_any_step(world: Callable[..., World], point: str) -> None:
    w, transcript = world(4, rounds=3, quorum=3), Transcript()
    started(w, transcript, {"p1": {f"{point}@{2 if point == 'voting' else 1}": die}})
    w.join()
    w.judged()
    sums = assert_nobody_is_told_apart(transcript, w.roster)
    everybody, rest = ("p0", "p1", "p2", "p3"), ("p0", "p2", "p3")
    survivors = [life for life in w.lives if life.name != "p1"]
    assert all(torch.equal(life.parameters, survivors[0].parameters) for life in survivors)
    in_round_1 = {w for e in w.settled if e.round == 2 and e.weights for w in [tuple(e.weights)]}
    if point in ("reveal:after", "voting"):
        # All keys are out, so the sum over four is known: it must stay the only one of this round.
        assert sums == [(0, everybody), (1, ()), (1, everybody), (2, rest)]
        assert in_round_1 == {(0.0, 0.0, 0.0)}
    elif point == "confirmation:after":
        # Those who had revealed by then count 0; p1 has not revealed, so no sum is known.
        assert sums == [(0, everybody), (1, ()), (2, rest)]
        assert in_round_1 == {(0.0, 0.0, 0.0)}
    else:
        assert sums == [(0, everybody), (1, rest), (2, rest)]
        assert in_round_1 == {(1.0, 1.0, 1.0)}


@pytest.mark.parametrize("victim", ["p0", "p2", "p3"])
def test_each_party_is_killed_between_confirmation_and_reveal(
    world: Callable[..., World], victim: str
) -> None:
    w, transcript = world(5, rounds=2, quorum=3), Transcript()
    started(w, transcript, {victim: {"confirmation:after@1": die}})
    w.join()
    w.judged()
    rest = tuple(name for name in w.roster if name != victim)
    sums = assert_nobody_is_told_apart(transcript, w.roster)
    assert sums[0] == (0, tuple(w.roster))
    assert set(sums[1:]) <= {(1, ()), (1, rest)}


def test_what_was_revealed_is_remembered_through_attempts_in_which_nobody_counts(
    world: Callable[..., World],
) -> None:
    """p1 dies when the sum over five is known, p2 in the attempt after, in which all count 0."""
    w, transcript = world(5, rounds=2, quorum=3), Transcript()

    def dies_the_next_time(life: Life) -> None:
        life.faults["reveal:after"] = die

    started(w, transcript, {"p1": {"reveal:after@1": die}, "p2": {"voting@2": dies_the_next_time}})
    w.join()
    w.judged()
    assert {life.name for life in w.lives if life.dead} == {"p1", "p2"}
    assert_nobody_is_told_apart(transcript, w.roster)


def test_what_was_revealed_in_vain_is_lost_for_the_metrics_too(world: Callable[..., World]) -> None:
    """A mean over four whose sum is known is not made again over three: their difference is the fourth's."""
    w, transcript = world(4, rounds=2, quorum=3), Transcript()
    means: dict[str, dict[str, float]] = {}

    def asks(life: Life) -> None:
        assert life.aggregator is not None
        means[life.name] = life.aggregator.mean({"loss": (1.0 + life.index, 1.0)})

    faults: dict[str, dict[str, Act]] = {name: {"training@1": asks} for name in w.roster}
    reveals = 0

    def dies_in_the_mean(life: Life) -> None:
        nonlocal reveals
        reveals += 1
        life.faults["reveal:after"] = die if reveals == 1 else dies_in_the_mean

    faults["p3"]["reveal:after"] = dies_in_the_mean
    started(w, transcript, faults)
    w.join()
    w.judged()
    assert "p3" not in means
    assert [means[name] for name in ("p0", "p1", "p2")] == [{}, {}, {}]


def test_with_too_few_left_nobody_sends_anything(world: Callable[..., World]) -> None:
    w, transcript = world(3, rounds=2, quorum=3, wait_s=1.5), Transcript()
    started(w, transcript, {"p2": {"sum:before@1": die}})
    for life in w.lives:
        life.join()
    assert all(isinstance(life.error, FederationError) for life in w.lives[:2])
    assert assert_nobody_is_told_apart(transcript, w.roster) == [(0, ("p0", "p1", "p2"))]


def test_who_comes_back_counts_again(world: Callable[..., World]) -> None:
    w, transcript = world(4, rounds=1_000_000, quorum=3), Transcript()
    started(w, transcript, {"p1": {"reveal:after@1": die}}, pace_s=0.02)
    w.lives[1].join()
    before = w.reached
    w.start(
        "p1", weight=1.0, exchange=masked(fractional_bits=DIGITS), faults={"started": transcript.listening()}
    )
    w.until(lambda: w.counts("p1", since=before + 1))
    w.finish()
    w.judged()
    assert_nobody_is_told_apart(transcript, w.roster)


# ---- a rendezvous that lies


def test_zeros_are_not_taken_for_others_that_count(world: Callable[..., World]) -> None:
    """Who makes a party believe that two others count, too, sees what it sends: they must notice."""
    w, transcript = world(3, rounds=2, quorum=3, wait_s=2.0), Transcript()

    def lie(key: str, value: bytes | None) -> bytes | None:
        return value and value.replace(b'"weight":0.0', b'"weight":1.0')

    for name in w.roster:
        w.start(
            name,
            faults={"started": transcript.listening()},
            weight=float(name == "p0"),
            exchange=masked(fractional_bits=DIGITS),
            twist=lie,
        )
    for life in w.lives:
        life.join()
    assert not [of_sum for _, of_sum in told(transcript, w.roster) if len(of_sum) == 1]


def test_what_was_revealed_is_remembered_against_the_store(world: Callable[..., World]) -> None:
    """A party knows best whether it has revealed a sum, whatever the store says that it has said."""
    w, transcript = world(4, rounds=3, quorum=3, wait_s=2.0), Transcript()

    def lie(key: str, value: bytes | None) -> bytes | None:
        return value and re.sub(rb'"exposed":\[[^]]*\]', b'"exposed":[]', value)

    started(w, transcript, {"p1": {"reveal:after@1": die}}, twist=lie)
    for life in w.lives:
        life.join()
    assert_nobody_is_told_apart(transcript, w.roster)


# ---- refused


@pytest.mark.parametrize(
    ("parties", "needed", "words"),
    [(3, None, "the quorum is 2"), (3, 2, "the quorum is 2"), (2, None, "needs 3 parties, not 2")],
)
def test_too_few_parties_are_refused_before_they_meet(
    world: Callable[..., World], parties: int, needed: int | None, words: str
) -> None:
    w = world(parties, rounds=1, **({} if needed is None else {"quorum": needed}))
    w.start(exchange=masked())
    for life in w.lives:
        life.join()
        assert isinstance(life.error, ValueError)
        assert words in str(life.error)


def test_a_stranger_with_anothers_name_is_refused_by_name_and_soon(world: Callable[..., World]) -> None:
    """It has all the settings, but not the key: each names it, and nobody waits for anything."""
    w, transcript = world(4, rounds=2, quorum=3, wait_s=2.0), Transcript()
    exchange = masked(fractional_bits=DIGITS)
    stranger = signing_key_of("p2", "strangers")

    def credentials(federation: Any) -> Any:
        own = stranger if federation.name == "p2" else signing_key_of(federation.name)
        return own, TrustedKeys(keys())

    exchange.credentials = credentials  # type: ignore[method-assign]
    began = time.monotonic()
    started(w, transcript, exchange=exchange)
    for life in w.lives:
        life.join()
    assert time.monotonic() - began < 10
    said = [str(life.error) for life in w.lives]
    assert any("cannot authenticate party p2" in words for words in said)
    assert any(signing_key_of("p2").public_key in words for words in said)
    assert not transcript.sums()
    assert keys() != keys("strangers")
