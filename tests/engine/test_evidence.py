"""Signed evidence of separate jobs: every committed round leaves a certificate, whatever happens to whom."""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates import authority, elliptic, tls_of
from job_threads import Life, World, die, loses_rendezvous
from party_threads import in_threads
from secure_exchange import keys, masked

from pellm_lightning import Aggregator
from pellm_lightning.cli.verify import verified_dispute
from pellm_lightning.comm import ElasticFederation, Membership, PartyLostError
from pellm_lightning.comm.elastic.commit import decision_key
from pellm_lightning.comm.evidence.certificate import RoundStatement
from pellm_lightning.comm.evidence.chain import FILE_NAME, Chain, Trust, is_signed, verify
from pellm_lightning.comm.rendezvous.client import RendezvousStore
from pellm_lightning.comm.rendezvous.server import RendezvousServer
from pellm_lightning.comm.signing_keys import Authorities, TrustedKeys
from pellm_lightning.engine.evidence import digest
from pellm_lightning.privacy.mechanism import GaussianMechanism
from pellm_lightning.tensors.flat_buffer import Layout


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(parties: int = 3, **arguments: Any) -> World:
        worlds.append(World(parties, **{"tls": tls_of, "state_dir": tmp_path} | arguments))
        return worlds[-1]

    yield make
    for w in worlds:
        w.close()


def trust() -> Trust:
    return Authorities((authority() / "ca.pem").read_bytes())


def chain_of(life: Life, by: Trust | None = None) -> Chain:
    """The chain that a party would export; it holds, and ends with the party's parameters."""
    assert life.aggregator is not None
    chain = Chain.parse(life.aggregator.evidence or "")
    verify(chain, by or trust())
    last = chain.certificates[-1].statement
    assert last.round == life.aggregator.round - 1
    assert last.result == digest(Layout({"w": life.w}), life.aggregator.global_vector)
    return chain


def test_each_round_is_signed_by_all_who_took_part(world: Callable[..., World], tmp_path: Path) -> None:
    w = world(rounds=4)
    lives = w.start()
    w.join()
    chains = [chain_of(life) for life in lives]
    assert len({chain.head for chain in chains}) == 1
    for chain in chains:
        assert [len(c.signatures) for c in chain.certificates] == [3] * 4
        for certificate in chain.certificates:
            statement = certificate.statement
            assert statement.members == statement.counted == ("p0", "p1", "p2")
            assert statement.weights == (1.0, 2.0, 3.0)
            assert statement.rule.startswith("LowRankMean(")
            assert statement.epsilon is None
    kept = (tmp_path / "p1" / FILE_NAME).read_text()
    assert kept == chains[1].text
    assert all(path.suffix == ".jsonl" for path in (tmp_path / "p1").iterdir()), "the end has left more"


def disputes(path: Path) -> list[list[str]]:
    """What each dispute that a party has kept proves."""
    return [verified_dispute(file, authority() / "ca.pem") for file in sorted(path.glob("dispute-*.jsonl"))]


def after(event: threading.Event, act: Callable[[Any], Any], argument: Any) -> Any:
    event.wait(20)
    return act(argument)


def test_a_member_that_signs_two_results_of_an_attempt_is_proven_to_have_done_so(
    world: Callable[..., World], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    w = world(rounds=5)
    lives = w.start(pace_s=0.01)
    w.until(lambda: all(life.aggregator is not None for life in lives))
    federation: Any = lives[2].federation
    evidence: Any = lives[2].aggregator._evidence  # type: ignore[union-attr]
    honest, signed_both = federation.commit, threading.Event()

    def equivocates(digest: str, signature: str = "", statement: str = "") -> Any:
        if not signature or signed_both.is_set():
            return honest(digest, signature, statement)
        protocol, view = federation._commit_protocol, federation._current_view
        other = replace(RoundStatement.from_json(json.loads(statement)), result="f" * 64)
        protocol.vote(view, "f" * 64, evidence._signer.sign(other).value, other.text)
        w.until(lambda: federation._register.read(decision_key(view)) != [None])
        protocol.vote(view, digest, signature, statement)
        signed_both.set()
        raise PartyLostError("it goes on as if nothing had been")

    for life in lives[:2]:  # whoever decides has read the first vote, and reads the second one then
        of: Any = life.federation._commit_protocol  # type: ignore[union-attr]
        of.seen = partial(after, signed_both, of.seen)
    federation.commit = equivocates
    w.join()
    said = [*disputes(tmp_path / "p0"), *disputes(tmp_path / "p1")][0]
    assert "its members have signed 2 statements, which differ in result." in said[0]
    assert "p2 has signed more than one: it equivocated." in said
    assert "Party p2 has signed two different statements of it. What the members have signed" in caplog.text
    assert f"`pellm verify {tmp_path}" in caplog.text
    chain_of(lives[0])


def test_whose_result_differs_again_is_excluded_and_what_it_has_signed_is_kept(
    world: Callable[..., World], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    w = world(rounds=5)
    lives = w.start(pace_s=0.01)
    w.until(lambda: all(life.aggregator is not None for life in lives))
    evidence: Any = lives[2].aggregator._evidence  # type: ignore[union-attr]
    state_round = evidence.state_round
    federation: Any = lives[2].federation
    leave, excluded = federation.abort, "party p2 is excluded for the rest of this run: it computed another"

    def leaves_late(reason: str) -> None:
        """Its vote would go with it, which the others are about to read."""
        w.until(lambda: caplog.text.count(excluded) == 2)
        leave(reason)

    federation.abort = leaves_late
    evidence.state_round = lambda *given: replace(state_round(*given), result="f" * 64)
    error = str(lives[2].join().error)
    assert "Party p2 and the majority of the parties computed different results" in error
    assert f"`pellm verify {tmp_path / 'p2'}" in error
    w.lives.remove(lives[2])
    w.join()
    for life in lives[:2]:
        kept = disputes(tmp_path / life.name)
        assert kept
        for _, *statements, last, _, _, _, _ in kept:
            assert sorted(line.split("): ")[1] for line in statements) == ["p0, p1", "p2"]
            assert last.startswith("Nobody has signed more than one")
        chain_of(life)


def test_a_restart_of_all_continues_the_chain(world: Callable[..., World]) -> None:
    w = world(rounds=6)
    first = w.start(faults={"training@3": die})
    w.join()
    w.rendezvous.restart()
    before = chain_of(first[0])
    again = w.start()
    w.join()
    chain = chain_of(again[2])
    assert len(chain.certificates) == 6
    assert [c.line for c in chain.certificates[:3]] == [c.line for c in before.certificates]


def test_a_checkpoint_continues_the_chain(world: Callable[..., World]) -> None:
    """Without a state_dir the checkpoint holds it; older checkpoints than the last round, too."""
    w = world(rounds=4, state_dir=None)
    first = w.start(faults={"training@2": die})
    w.join()
    saved = [life.aggregator.state_dict() for life in first if life.aggregator]
    w.rendezvous.restart()
    for name, state in zip(w.roster, saved, strict=True):
        w.start(name, resume=state)
    w.join()
    assert len(chain_of(w.lives[-1]).certificates) == 4


def test_who_comes_late_takes_the_chain_over(world: Callable[..., World], tmp_path: Path) -> None:
    w = world(4, rounds=99, wait_s=1.0)
    w.start("p0", "p1", "p2", pace_s=0.02)
    w.wait_for(3)
    (late,) = w.start("p3", pace_s=0.02)
    w.until(lambda: w.counts("p3"))
    w.finish()
    chain = chain_of(late)
    assert "p3" not in chain.certificates[0].statement.members
    assert "p3" in chain.certificates[-1].signatures
    assert (tmp_path / "p3" / FILE_NAME).read_text() == chain.text


def test_who_comes_back_gets_what_it_has_missed_only(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[Chain] = []
    parse = Chain.parse.__func__  # type: ignore[attr-defined]

    def noting(cls: type[Chain], text: str) -> Chain:
        chain: Chain = parse(cls, text)
        if chain.certificates and chain.certificates[0].statement.round > 0:
            received.append(chain)
        return chain

    monkeypatch.setattr(Chain, "parse", classmethod(noting))
    verified: list[str] = []

    def counting(statement: str, *arguments: Any) -> bool:
        verified.append(statement)
        return is_signed(statement, *arguments)

    monkeypatch.setattr("pellm_lightning.comm.evidence.chain.is_signed", counting)
    w = world(rounds=99)
    w.start("p0", "p1", pace_s=0.02)
    w.start("p2", faults={"training@3": die})
    w.until(lambda: w.reached > 6)
    (back,) = w.start("p2", pace_s=0.02)
    w.until(lambda: w.counts("p2", since=6))
    w.finish()
    checked = len(verified)
    chain = chain_of(back)
    assert [len(c.signatures) for c in chain.certificates[:5]] == [3, 3, 3, 2, 2]
    assert received[0].certificates[0].statement.round >= 3
    assert checked <= sum(len(c.signatures) for sent in received for c in sent.certificates)


def test_what_was_voted_as_the_rendezvous_died_is_signed_later(world: Callable[..., World]) -> None:
    """Nobody learns the decision on a round, and its result stands; the next meeting brings signatures."""
    w = world(rounds=5)
    faults = {"vote:after@3": loses_rendezvous}
    w.start("p0", "p1")
    w.start("p2", faults=faults)
    w.join()
    for life in w.lives:
        chain = chain_of(life)
        assert len(chain.certificates) == 5


def test_one_that_dies_after_its_vote_is_signed_for_by_the_others(world: Callable[..., World]) -> None:
    w = world(rounds=6)
    w.start("p0", "p1", pace_s=0.02)
    w.start("p2", faults={"vote:after@2": die})
    w.join()
    chain = chain_of(w.lives[0])
    assert len(chain.certificates) == 6


def lie(lives: list[Life], most: int) -> list[str]:
    """Let those who are asked first for their chain, ``most`` of them, change a weight in it; return who."""
    liars: list[str] = []
    for life in lives:
        assert life.aggregator is not None
        store, read = life.aggregator._evidence._store, life.aggregator._evidence._store.read

        def lying(name: str = life.name, read: Callable[[], Chain] = read) -> Chain:
            if name not in liars and len(liars) < most:
                liars.append(name)
            weight = "9.0" if name in liars else "2.0"
            return Chain.parse(read().text.replace('"weights":[1.0,2.0]', f'"weights":[1.0,{weight}]', 1))

        store.read = lying  # type: ignore[method-assign]
    return liars


def test_another_party_is_asked_for_evidence_that_holds(
    world: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    w = world(3, rounds=99, wait_s=1.0)
    lives = w.start("p0", "p1", pace_s=0.02)
    w.wait_for(3)
    liars = lie(lives, 1)
    (late,) = w.start("p2", pace_s=0.02)
    w.until(lambda: w.counts("p2"))
    w.finish()
    assert f"cannot accept the evidence that party {liars[0]} has sent" in caplog.text
    chain = chain_of(late)
    assert [c.statement.weights for c in chain.certificates[:3]] == [(1.0, 2.0)] * 3
    w.judged()


@pytest.mark.parametrize("size", [-1, 1 << 40])
def test_sizes_that_cannot_be_harm_nobody(
    world: Callable[..., World], caplog: pytest.LogCaptureFixture, size: int
) -> None:
    """One member names such a size of evidence: who is asked first, or who is not asked at all."""
    caplog.set_level(logging.INFO)
    w = world(3, rounds=99, wait_s=1.0)
    lives, asked = w.start("p0", "p1", pace_s=0.02), list[int]()
    w.wait_for(3)
    for life in lives:
        assert life.federation is not None
        for name in ("all_reduce_", "broadcast_"):
            act = getattr(life.federation, name)

            def lying(x: Any, *source: int, act: Any = act, index: int = life.index) -> Any:
                if x.dtype == torch.int64 and len(x) == 3:
                    asked.extend(source)
                    if source == (index,) == (asked[0],) or (not source and index == 1):
                        x[-1] += size - x[-1]
                return act(x, *source)

            setattr(life.federation, name, lying)
    w.start("p2", pace_s=0.02)
    w.until(lambda: w.counts("p2"))
    w.finish()
    assert f"Party p{asked[0]} would send {size} bytes of evidence" in caplog.text


def test_evidence_that_does_not_hold_is_not_taken_over(world: Callable[..., World]) -> None:
    """Where a quorum sends such, the fault is here: who comes late says so, the others continue."""
    w = world(3, rounds=99, wait_s=1.0)
    lives = w.start("p0", "p1", pace_s=0.02)
    w.wait_for(3)
    lie(lives, 2)
    (late,) = w.start("p2")
    late.join()
    assert "cannot accept the evidence that party p" in str(late.error)
    assert "round 1 does not follow" in str(late.error) or "does not fit" in str(late.error)
    w.lives.remove(late)
    w.until(lambda: w.reached > 5)
    w.finish()


def test_a_member_that_signs_something_else_does_not_count(
    world: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    w = world(rounds=3)
    for name in w.roster:
        (life,) = w.start(name)
        w.until(lambda life=life: life.aggregator is not None)
        if name == "p1":
            life.aggregator._evidence.sign = lambda statement: "A" * 86 + "=="  # type: ignore[union-attr, method-assign]
    w.join()
    chain = chain_of(w.lives[0])
    assert [sorted(c.signatures) for c in chain.certificates] == [["p0", "p2"]] * 3
    assert "the signature of party p1 is not one of this round by its key" in caplog.text


def test_a_certificate_that_cannot_be_written_is_said(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round stands all the same: the others continue, and have the certificate."""
    w = world(rounds=4)
    w.start("p0", "p1")
    (full,) = w.start("p2")
    w.until(lambda: full.aggregator is not None)

    def no_space(certificates: Any) -> None:
        raise OSError(28, "No space left on device", "evidence.jsonl")

    assert full.aggregator is not None
    monkeypatch.setattr(full.aggregator._evidence._store, "_append", no_space)
    full.join()
    assert "Party p2 cannot keep the certificate of round" in str(full.error)
    assert "No space left on device" in str(full.error)
    w.lives.remove(full)
    w.join()
    assert len(chain_of(w.lives[0]).certificates) == 4


def test_pinned_keys_of_secure_aggregation_sign_and_hide_weights(world: Callable[..., World]) -> None:
    w = world(rounds=2, tls=None, quorum=3)
    w.start(exchange=masked())
    w.join()
    pinned = {name: text for name, text in TrustedKeys(keys())._texts.items() if name in w.roster}
    chain = chain_of(w.lives[0], TrustedKeys(pinned))
    for certificate in chain.certificates:
        assert certificate.statement.weights is None
        assert certificate.statement.counted == ("p0", "p1", "p2")
    assert next(iter(chain.identities.values())).certificate is None


def test_epsilon_is_stated(world: Callable[..., World]) -> None:
    privacy = GaussianMechanism(noise_multiplier=1.0, max_norm=1.0, delta=1e-5, distributed=False)
    w = world(rounds=2)
    w.start(privacy=privacy, weight=1.0)
    w.join()
    first, second = (c.statement.epsilon for c in chain_of(w.lives[0]).certificates)
    assert first is not None
    assert second is not None
    assert 0 < first < second


def test_without_keys_nothing_is_stated(world: Callable[..., World], tmp_path: Path) -> None:
    w = world(rounds=2, tls=None)
    w.start()
    w.join()
    for life in w.lives:
        assert life.aggregator is not None
        assert life.aggregator.evidence is None
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_party_whose_key_cannot_sign_takes_part_and_keeps_none(
    world: Callable[..., World], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TLS takes certificates of any kind of key, evidence takes Ed25519."""
    odd = elliptic(authority(), "p2") if not (authority() / "p2.pem").exists() else None

    def tls(name: str) -> Any:
        if name != "p2":
            return tls_of(name)
        return odd or _elliptic(tmp_path)

    w = world(rounds=2, tls=tls)
    w.start()
    w.join()
    assert [sorted(c.signatures) for c in chain_of(w.lives[0]).certificates] == [["p0", "p1"]] * 2
    assert w.lives[2].aggregator is not None
    assert w.lives[2].aggregator.evidence is None
    assert "[party p2] signs no evidence" in caplog.text


def test_certificates_that_are_never_complete_cost_no_more_with_each_round(
    world: Callable[..., World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three do not sign: nothing is complete, and neither headers nor writing grow."""
    synced, shown = list[int](), dict[int, int]()
    fsync = os.fsync

    def counting(file: int) -> None:
        if threading.current_thread() is first.thread:
            synced.append(file)
        fsync(file)

    w = world(rounds=40, state_dir=None)
    monkeypatch.setattr("pellm_lightning.comm.evidence.store.os.fsync", counting)
    for name in ("p2", "p1"):
        (life,) = w.start(name)
        w.until(lambda life=life: life.aggregator is not None)
        assert life.aggregator is not None
        monkeypatch.setattr(life.aggregator._evidence, "sign", lambda statement: "")
        monkeypatch.setattr(life.aggregator._evidence, "shown", dict)
    (first,) = w.start("p0")
    w.until(lambda: first.aggregator is not None)
    assert first.aggregator is not None
    keeper = first.aggregator._evidence
    keeper._store._directory = tmp_path / "kept"
    show = keeper.shown

    def showing() -> dict[str, Any]:
        said = show()
        shown[len(keeper._store.pending)] = len(json.dumps(said))
        return said

    monkeypatch.setattr(keeper, "shown", showing)
    w.join()
    assert len(keeper._store.pending) == 40
    assert shown[39] == shown[20] < 3000
    assert len(synced) <= 42
    assert len(Chain.parse((tmp_path / "kept/evidence-pending.jsonl").read_text()).certificates) == 40


def _elliptic(tmp_path: Path) -> Any:
    folder = tmp_path / "odd"
    folder.mkdir(exist_ok=True)
    for name in ("ca.pem", "ca.key"):
        (folder / name).write_bytes((authority() / name).read_bytes())
    return elliptic(folder, "p2")


def test_a_round_with_evidence_costs_no_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests to the rendezvous per round as without: the vote carries the signature."""
    counts: list[dict[bool, list[int]]] = [{}, {}, {}]
    roster = [f"p{place}" for place in range(3)]

    class Counting(RendezvousStore):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            self.asked = 0
            super().__init__(*arguments, **keywords)

        def _ask(self, *arguments: Any, **keywords: Any) -> Any:
            self.asked += 1
            return super()._ask(*arguments, **keywords)

    def party(index: int, address: str, signs: bool) -> None:
        clients: list[Counting] = []

        def connect() -> Counting:
            clients.append(Counting(address, tls=tls_of(roster[index])))
            return clients[-1]

        membership = Membership(heartbeat_ttl_s=60, wait_s=30)
        federation = ElasticFederation(
            connect, roster[index], roster, membership=membership, tls=tls_of(roster[index])
        )
        aggregator = Aggregator(federation, {"w": torch.zeros(3)})
        aggregator._evidence.is_on = signs
        aggregator.start()
        for _ in range(6):
            before = clients[0].asked
            aggregator.step(1.0)
            counts[index].setdefault(signs, []).append(clients[0].asked - before)
        federation.abort()

    for signs in (False, True):
        with RendezvousServer("127.0.0.1", 0, roster=roster, tls=tls_of("rendezvous")) as server:
            in_threads([partial(party, index, server.address, signs) for index in range(3)])
    for of_party in counts:
        assert max(of_party[True][1:]) <= 5, counts
    # Threads take turns, so who decides, and asks once more, differs; the sum does not.
    sums = [sum(sum(of_party[signs][1:]) for of_party in counts) for signs in (False, True)]
    assert sums[1] <= sums[0] + 3, counts
