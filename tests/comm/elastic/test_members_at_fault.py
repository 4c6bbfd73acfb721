"""Members that are misconfigured, slow, or lie: waits end, who is to blame is named, the innocent go on."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from job_threads import Life, TransactingClient, World, die
from lora_oracles import adapter, drift
from round_history import findings, noise

from pellm_lightning.comm import ElasticFederation, Membership, MismatchError, TooFewPartiesError
from pellm_lightning.comm.elastic.register import Register
from pellm_lightning.comm.mesh import mesh
from pellm_lightning.comm.rendezvous import key_value_store

MANY = 1_000_000


def nowhere() -> str:
    """An address at which nobody listens."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


# ---- links


@pytest.mark.parametrize("parties", [2, 3])
def test_attempts_over_a_broken_link_end_and_name_it(world: Callable[..., World], parties: int) -> None:
    """All live, and join each time; with a quorum of all nobody can be left out."""
    w = world(parties, rounds=3, quorum=parties, wait_s=1.0, exchange_timeout_s=0.3)
    address = nowhere()
    w.start("p0", advertise=address)
    w.start(*w.roster[1:])
    began = time.monotonic()
    for life in w.lives:
        error = life.join(10).error
        assert isinstance(error, TooFewPartiesError), repr(error)
        assert "attempts at a round in" in str(error)
        assert f"p0 ({address})" in str(error)
    assert time.monotonic() - began < 1.0 + 3 * 0.3 + 2.0
    assert w.reached == 0


def test_a_party_that_is_left_out_waits_for_its_link_while_the_others_go_on(
    world: Callable[..., World],
) -> None:
    """It fails again at each retry, for longer than wait_s; the others make progress in between."""
    w = world(4, rounds=MANY, wait_s=0.8, exchange_timeout_s=0.2)
    (cut_off,) = w.start("p0", advertise=nowhere())
    w.start("p1", "p2", "p3", pace_s=0.02)
    failed: list[float] = []
    w.until(lambda: cut_off.federation is not None)
    limit: Any = cut_off.federation._limit  # type: ignore[union-attr]
    fails = limit.failed

    def counted(reason: str) -> None:
        failed.append(time.monotonic())
        fails(reason)

    limit.failed = counted
    w.until(lambda: len(failed) >= 5 and failed[-1] - failed[0] > 2 * 0.8)
    before = w.reached
    w.wait_for(before + 2)
    assert cut_off.error is None


def test_a_party_that_leads_others_to_themselves_is_named(world: Callable[..., World]) -> None:
    """Its address is right at its own host only, where another of that host answers, or nobody."""
    w = world(3, rounds=3, exchange_timeout_s=0.4)
    w.start("p1", "p2")
    w.until(lambda: all(life.federation is not None for life in w.lives))
    other = w.lives[0].federation
    assert other is not None
    (lost,) = w.start("p0", advertise=other._address)
    w.until(lambda: lost.federation is not None)
    w.until(lambda: {entry.party for entry in w.settled if entry.round == 3} >= {"p1", "p2"})


@pytest.mark.parametrize("given", [{"listen": "0.0.0.0:0"}, {"listen": "[::]:0"}, {"listen": ":0"}])
def test_an_address_that_nobody_can_dial_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"of party a stands for all interfaces of a host.*advertise="):
        ElasticFederation(lambda: pytest.fail("it connects"), "a", ["a", "b"], **given)
    with pytest.raises(ValueError, match=r"advertise='0.0.0.0:7' of party a"):
        ElasticFederation(lambda: pytest.fail("it connects"), "a", ["a"], advertise="0.0.0.0:7")


# ---- votes


def test_a_vote_that_is_withheld_costs_one_timeout(world: Callable[..., World]) -> None:
    w = world(3, rounds=MANY, round_timeout_s=1.0)
    over = threading.Event()
    w.start("p1", "p2", pace_s=0.02)
    (silent,) = w.start("p0", pace_s=0.02, faults={"vote:before@3": lambda _: over.wait(20)})
    w.until(lambda: not silent.faults)
    began, before = time.monotonic(), w.reached
    w.until(lambda: w.reached >= before + 2, 5)
    took = time.monotonic() - began
    over.set()
    assert took < 1.8, "it costs one timeout, and then it is left out"
    w.until(lambda: w.counts("p0", since=before + 2))
    w.finish()
    w.judged()


# ---- drips


@pytest.mark.parametrize("kind", [mesh.Kind.PART, mesh.Kind.SUM])
@pytest.mark.parametrize(("parties", "index"), [(3, 0), (5, 4)])
def test_a_member_that_drips_costs_one_timeout(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, kind: mesh.Kind, parties: int, index: int
) -> None:
    """A byte now and then, from a part or a sum on, whenever it takes part."""
    w = world(parties, rounds=MANY, exchange_timeout_s=1.0, heartbeat_ttl_s=1.5)
    began: list[float] = []
    turned, over = {"drips": False}, threading.Event()
    send, name = mesh.Link._send, f"job p{index}"

    def drips(link: mesh.Link, data: memoryview) -> int:
        head = bytes(data[:5])
        if threading.current_thread().name != name or w.reached < 3 or over.is_set():
            return send(link, data)
        if head[:3] == b"PeL" and head[4] == kind:
            turned["drips"] = True
            began[:] = began or [time.monotonic()]
        if not turned["drips"]:
            return send(link, data)
        link.events |= mesh.EVENT_WRITE
        time.sleep(0.02)
        return send(link, data[:1])

    monkeypatch.setattr(mesh.Link, "_send", drips)
    w.start(pace_s=0.02)
    (dripping,) = (life for life in w.lives if life.index == index)

    def begins(life: Life) -> None:
        turned["drips"] = False  # it sends well up to the message of that kind
        life.faults["forming"] = begins

    dripping.faults["forming"] = begins
    w.until(lambda: bool(began))
    before = w.reached
    w.until(lambda: w.reached >= before + 2, 10)
    took = time.monotonic() - began[0]
    assert took < 2.6, "it costs one timeout, and then it is left out for as long"
    over.set()
    w.until(lambda: w.counts(f"p{index}", since=before + 2))
    w.finish()
    w.judged()


# ---- runs


def test_an_old_state_and_a_fresh_party_do_not_end_a_running_majority(
    world: Callable[..., World], tmp_path: Path
) -> None:
    """The fresh one matches both runs; who does not belong is refused, alone."""
    old = world(5, rounds=MANY, state_dir=tmp_path / "old")
    old.start(pace_s=0.01)
    old.wait_for(2)
    old.kill()
    w = world(5, rounds=MANY, wait_s=3.0)
    w.start("p0", "p1", "p2", "p3", pace_s=0.03)
    w.lives[3].faults["training@3"] = die
    w.until(lambda: w.lives[3].dead)
    for name, arguments in (("p3", {}), ("p4", {"state_dir": tmp_path / "old/p4"})):
        w.start(name, pace_s=0.03, **arguments)
    refused = w.lives[-1]
    assert isinstance(refused.join(10).error, MismatchError), refused.error
    assert "different federations" in str(refused.error)
    w.lives.remove(refused)
    before = w.reached
    w.until(lambda: w.counts("p3", since=before))
    assert [life.error for life in w.lives] == [None] * 5
    w.finish()
    assert w.judged().lineages == 1


# ---- lies


def test_no_false_view_makes_a_party_take_part_in_an_attempt_twice() -> None:
    """It would sign two statements of one attempt, and look as if it equivocated."""
    store = dist.HashStore()
    federation = ElasticFederation(lambda: store, "a", ["a"], membership=Membership(wait_s=5))
    assert federation.join_quorum("exchange", None, {}).attempt == 1
    other = Register(store)
    other.renew()
    other.claim("view/2", replace(federation._current_view, term=2).to_json())
    assert federation.join_quorum("exchange", None, {}).attempt == 2
    assert federation._current_view.term == 3
    federation.close()


def test_a_claim_of_a_newer_version_is_not_believed(world: Callable[..., World]) -> None:
    """Nobody takes over the state of one that says it has a newer one than all others can have."""
    w = world(4, rounds=6)
    w.start("p0", "p1", "p2")
    (liar,) = w.start("p3")
    w.until(lambda: liar.aggregator is not None)
    assert liar.federation is not None
    honest = liar.federation.join_quorum

    def lies(intent: Any, version: Any, metadata: Any, state: str = "") -> Any:
        if version is not None and version.round == 3:
            version = version._replace(attempt=version.attempt + 10**6)
        return honest(intent, version, metadata, state)

    liar.federation.join_quorum = lies  # type: ignore[method-assign]
    w.join()
    assert w.judged().rounds == 6
    # Those who believed it would count 0 in that round, as one does that lacks the newest state.
    assert [entry.weights for entry in w.settled if entry.round == 4] == [[1, 2, 3, 0]] * 4


def test_a_state_that_is_not_the_voted_one_is_not_loaded(world: Callable[..., World]) -> None:
    """Of three that can send it one sends another, down to a moment of the outer optimizer."""
    w = world(4, rounds=MANY, wait_s=4.0)
    w.start("p0", "p1", "p2", pace_s=0.02, outer_optimizer=momentum)
    w.until(lambda: all(life.aggregator is not None for life in w.lives))
    sent: list[int] = []
    liar = w.lives[0].aggregator
    assert liar is not None
    honest = liar._global_state.state

    def lies() -> dict[str, Any]:
        state = honest()
        if threading.current_thread().name == "job p0" and _transfers():
            sent.append(1)
            fragment = dict(state["fragments"][0])
            fragment["outer_optimizer"] = _changed(fragment["outer_optimizer"])
            return state | {"fragments": [fragment]}
        return state

    liar._global_state.state = lies  # type: ignore[method-assign]
    w.wait_for(2)
    for _ in range(3):
        (late,) = w.start("p3", pace_s=0.02, outer_optimizer=momentum)
        before = w.reached
        w.until(lambda: w.counts("p3", since=before))  # noqa: B023
        if sent:
            break
        late.stop()
        late.join()
    w.finish()
    assert sent, "the liar was never asked"
    assert not findings(w.entries, w.roster).divergent


def validates(life: Life) -> None:
    """Local steps, and a mean of metrics."""
    assert life.aggregator is not None
    life.w.copy_(life.aggregator.global_vector + noise(life.index, life.aggregator.round, life.w.numel()))
    life.aggregator.mean({"loss": (1.0, 1.0)})


@pytest.mark.parametrize(
    ("liar", "lie"),
    [
        ("p0", {"round": 99}),
        ("p2", {"purpose": 9}),
        ("p1", {"weight": [1], "tag": None}),
        ("p0", {"metrics": {"loss": 1}}),
        ("p2", {"names": 3}),
    ],
    ids=str,
)
def test_the_others_continue_without_one_whose_metadata_cannot_be(
    world: Callable[..., World], liar: str, lie: dict[str, Any]
) -> None:
    """All see that, so nobody has to blame it; it is tried again, and lies again."""
    w = world(3, rounds=MANY, wait_s=4.0)
    train = {"train": validates} if "metrics" in lie else {}
    w.start(pace_s=0.01, **train)
    (bad,) = [life for life in w.lives if life.name == liar]
    w.until(lambda: all(life.aggregator is not None for life in w.lives))
    assert bad.federation is not None
    join, told = bad.federation.join_quorum, [0]

    def lies(intent: Any, version: Any, metadata: Any, state: str = "") -> Any:
        if version is None or (lie.keys() == {"metrics"} and "metrics" not in metadata):
            return join(intent, version, metadata, state)
        result = join(intent, version, metadata | lie, state)
        told[0] += 1
        return replace(result, metadata=result.metadata | {liar: metadata})

    bad.federation.join_quorum = lies  # type: ignore[method-assign]
    w.until(lambda: told[0] >= 3)
    w.wait_for(w.reached + 3)
    others = [life for life in w.lives if life is not bad]
    assert [life.error for life in others] == [None, None]
    assert {entry.party for entry in w.settled if entry.round == w.reached - 1} >= {o.name for o in others}


def test_without_too_few_others_a_fault_is_an_error(world: Callable[..., World]) -> None:
    w = world(2, rounds=MANY)
    w.start()
    w.until(lambda: all(life.aggregator is not None for life in w.lives))
    bad = w.lives[0].federation
    assert bad is not None
    join = bad.join_quorum
    bad.join_quorum = lambda i, v, metadata, s="": join(i, v, metadata | {"round": 99}, s)  # type: ignore
    for life in w.lives:
        assert "Party p0 joined for round 99 with the global parameters of" in str(life.join().error)


@pytest.mark.parametrize("lora", [True, False])
def test_a_spec_that_cannot_be_read_ends_no_other_party(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    """Whoever starts reads it for shared files; members read it for the ranks of LoRA pairs."""
    honest = ElasticFederation.handshake

    def lies(self: ElasticFederation, spec: Any, *arguments: Any) -> Any:
        spec = spec | {"files": 7, "lora": 7} if self.name == "p2" else spec
        return honest(self, spec, *arguments)

    monkeypatch.setattr(ElasticFederation, "handshake", lies)
    w = world(3, rounds=MANY, wait_s=4.0)
    seen: list[Any] = []

    def train(life: Life) -> None:
        if lora:
            drift(0.1)(life.index, 0, life.arguments["parameters"])
        elif life.aggregator is not None:
            seen.append(life.aggregator.facts())

    def start(name: str) -> None:
        sizes = {"q": (6, 8)}
        given = {"parameters": adapter(w.roster.index(name), sizes, 2)} if lora else {}
        w.start(name, train=train, pace_s=0.01, **given)

    for name in ("p2", "p0", "p1"):
        start(name)
    w.wait_for(4)
    assert [life.error for life in w.lives[1:]] == [None, None]
    assert seen or lora


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9)


def _transfers() -> bool:
    """Whether this thread is sending its state to another party."""
    import inspect

    return any(frame.function == "send_state" for frame in inspect.stack())


def _changed(state: Any) -> Any:
    """The state of an optimizer, with another momentum."""
    if isinstance(state, torch.Tensor):
        return state + 1
    if isinstance(state, dict):
        return {key: _changed(value) for key, value in state.items()}
    return state


@pytest.mark.parametrize("keeps_on", [False, True])
def test_one_that_sends_different_numbers_to_different_members_is_found(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, keeps_on: bool
) -> None:
    """Its own piece of the sum, to every other member: the results differ by what it alone has done."""
    honest, sent = mesh.Outgoing, [0]

    def lies(label: Any, data: Any, ready: int | None = None) -> Any:
        out = honest(label, data, ready)
        equivocates = threading.current_thread().name == "job p4" and label.kind == mesh.Kind.SUM
        if not equivocates or (not keeps_on and sent[0] >= 8) or w.reached < 3:
            return out
        sent[0] += 1
        if sent[0] % 4:
            other = bytearray(data)
            other[0] ^= 1
            out.data, out.ready = memoryview(other), len(other)
        return out

    w = world(5, rounds=6, wait_s=6.0, exchange_timeout_s=2.0)
    monkeypatch.setattr(mesh, "Outgoing", lies)
    w.start()
    for life in w.lives[:4]:
        assert life.join(40).error is None, life.error
    assert sent[0]
    honest_entries = [entry for entry in w.settled if entry.party != "p4" and entry.round == 6]
    assert len(honest_entries) >= 4
    assert len({entry.digest for entry in honest_entries}) == 1
    w.lives[4].stop()


# ---- a full rendezvous


def test_a_member_that_fills_the_rendezvous_harms_itself_only(world: Callable[..., World]) -> None:
    w = world(3, rounds=MANY)
    w.start(pace_s=0.01)
    w.wait_for(2)
    stuffed = TransactingClient(w.rendezvous, "p2", lambda *_: None)

    def fills() -> None:
        for number in range(key_value_store.MAX_KEYS):
            stuffed.set(f"@p2/{number}", "")

    with pytest.raises(dist.DistStoreError, match="Party p2 has used its part of this rendezvous"):
        fills()
    before = w.reached
    w.wait_for(before + 3)
    assert [life.error for life in w.lives[:2]] == [None, None]
    w.rounds = w.reached + 1
    for life in w.lives[:2]:
        life.join()
    w.judged()


def test_a_rendezvous_without_room_is_waited_for(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world(3, rounds=MANY, wait_s=6.0)
    w.start(pace_s=0.01)
    w.wait_for(2)
    monkeypatch.setattr(key_value_store, "MAX_BYTES", 0)
    time.sleep(0.6)
    monkeypatch.undo()
    w.wait_for(w.reached + 2)
    w.finish()
    assert [life.error for life in w.lives] == [None] * 3
