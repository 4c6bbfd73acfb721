"""Networks that are slow, lossy, cut and mended, between parties that are processes on hosts of their own."""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import tls_of
from network_namespaces import Network, why_none
from network_parties import RENDEZVOUS, Parties
from round_history import findings

from pellm_lightning.comm.relay.server import RelayQuotas

WHY_NONE = why_none()
pytestmark = [
    pytest.mark.torchrun,
    pytest.mark.timeout(180),
    pytest.mark.skipif(WHY_NONE is not None, reason=str(WHY_NONE)),
]
TTL_S = 1.0
EXCHANGE_S = 0.5
Start = Callable[..., Parties]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts parties "a", "b" and so on, and returns when all have run a few rounds together."""
    made: list[Parties] = []

    def start(
        number: int, *, slow: dict[str, float] | None = None, firewall: Any = None, **arguments: Any
    ) -> Parties:
        roster = "abcd"[:number]
        network = Network(RENDEZVOUS, *roster)
        network.firewall = firewall
        for setting, value in (slow or {}).items():
            setattr(network, setting, value)
        membership = {"heartbeat_ttl_s": TTL_S, "wait_s": 60, "exchange_timeout_s": EXCHANGE_S}
        arguments["membership"] = membership | arguments.get("membership", {})
        parties = Parties(network, tmp_path, roster, **arguments)
        made.append(parties)
        parties.start()
        parties.wait_for(lambda: all(parties.reached(name) >= 2 for name in roster), 60)
        return parties

    yield start
    for parties in made:
        parties.close()
        parties.network.close()


def test_rounds_over_lines_that_are_slow_and_lossy(start: Start) -> None:
    # 80 ms there and back, as between continents; 20 Mbit/s, of which 50 000 parameters take 0.12 s.
    slow = {"delay_s": 0.04, "loss": 0.02, "bits_per_s": 20e6}
    patient = {"heartbeat_ttl_s": 10, "exchange_timeout_s": 10}
    parties = start(4, slow=slow, tls=tls_of, size=50_000, membership=patient)
    parties.wait_for(lambda: all(parties.reached(name) >= 3 for name in parties.roster), 60)
    assert parties.network.lost["loss"]
    rounds = [done for name in parties.roster for done in parties.rounds(name)[1:]]
    assert {members for _, members, _, _ in rounds} == {4}
    # Some 17 times there and back, most of them to the rendezvous; what is lost comes 0.2 s later or more.
    assert 0.4 < statistics.median(waited + took for _, _, waited, took in rounds) < 5
    digests = {(entry.round, entry.digest) for entry in parties.entries()}
    assert len(digests) == len({round for round, _ in digests}), "divergent"


def test_a_party_cut_off_from_all_comes_back(start: Start) -> None:
    parties = start(3)
    parties.network.split("c", ["a", "b", RENDEZVOUS])
    parties.wait_for(together(parties, "a", "b"))
    time.sleep(2 * TTL_S)
    assert parties.reached("a") > parties.reached("c") + 2
    parties.network.heal()
    parties.wait_for(together(parties, "a", "b", "c"))
    end(parties)


def test_a_network_in_parts(start: Start) -> None:
    """Without a majority that reaches itself and the rendezvous nobody commits; mended, all go on."""
    parties = start(4)
    for *sides, stops in [
        (["a", "b", RENDEZVOUS], ["c", "d"], True),
        (["a", "b"], ["c", "d"], True),
        ([RENDEZVOUS], ["a", "b", "c", "d"], True),
        (["a", "b", "c"], ["d"], False),
    ]:
        parties.network.split(*sides)
        if stops:
            time.sleep(TTL_S)  # by then what was under way is through, or has failed
            before = parties.reached("a")
            time.sleep(2 * EXCHANGE_S)
            assert parties.reached("a") == before, sides
        else:
            # Party d reaches the rendezvous, speaks first each time, and accuses all the others.
            parties.wait_for(together(parties, "a", "b", "c"))
        parties.network.heal()
        parties.wait_for(together(parties, "a", "b", "c", "d"))
    end(parties)


def test_nobody_can_be_dialed(start: Start) -> None:
    """Every inbound connection but those to the rendezvous is dropped; its relay is killed, and forgotten."""
    allowed = {(name, RENDEZVOUS, 29400) for name in "abc"}
    # Rounds of 0.8 MB there and back by the relay, so that what happens happens in one.
    # An exchange may stall for a minute, so that only the silence of a host can end it in time.
    patient = {"exchange_timeout_s": 60}
    parties = start(3, tls=tls_of, relay=RelayQuotas(), firewall=allowed, size=100_000, membership=patient)
    assert {members for _, members, _, _ in parties.rounds("a")[-1:]} == {3}
    assert parties.told().count("is connected by the relay with") >= 3
    assert parties.network.opened == allowed, "nobody tries a loopback address elsewhere than at itself"
    parties.start_rendezvous()
    parties.wait_for(together(parties, *"abc"))
    parties.network.forget()
    parties.wait_for(together(parties, *"abc"), 45)
    assert parties.network.lost["forgotten"]
    end(parties)


def test_of_two_that_cannot_reach_each_other_one_stays_away(start: Start) -> None:
    parties = start(4)
    parties.network.cut("a", "c")
    # After three attempts, of half a second each, and then one more in each round.
    parties.wait_for(together(parties, "a", "b", "d"))
    before = parties.reached("b")
    parties.wait_for(lambda: parties.reached("b") >= before + 3)
    assert {members for _, members, _, _ in parties.rounds("b")[-3:]} == {3}
    parties.network.heal()
    parties.wait_for(together(parties, "a", "b", "c", "d"))
    end(parties)


def together(parties: Parties, *names: str) -> Callable[[], bool]:
    """Tells whether all these have settled a round that is two after the last one now, with all of them."""
    goal = 2 + max(parties.reached(name) for name in parties.roster)

    def holds() -> bool:
        late = [entry for entry in parties.entries() if entry.round >= goal and entry.stage == "settled"]
        return set(names) <= {entry.party for entry in late if set(names) <= set(entry.members)}

    return holds


def end(parties: Parties) -> None:
    """End all, and judge what they have recorded: one result for each round, none missing, as in a replay."""
    parties.end()
    found = findings(parties.entries(), parties.roster)
    assert found.is_sound, (found, parties.told())
    last = max(parties.reached(name) for name in parties.roster)
    assert [parties.reached(name) for name in parties.roster] == [last] * len(parties.roster)
