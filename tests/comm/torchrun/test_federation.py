"""What joins the parties: sums to the bit, words through the store, and no party waiting for a lost one."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from message_transcript import tapped
from party_threads import in_threads, run_parties

from pellm_lightning import Federation, FederationError
from pellm_lightning.comm import MismatchError, PartyLostError, polling
from pellm_lightning.comm.topology import Topology, hide_launch
from pellm_lightning.comm.torchrun import federation, store_coordinator

SOON_S = 8.0
"""Far below the parties' timeout of 20 s, far above what a loaded machine needs."""


pytestmark = pytest.mark.usefixtures("lane")


def integers(size: int, party: int) -> torch.Tensor:
    """Small whole numbers, whose sums are exact in float32 in any order."""
    return torch.arange(size, dtype=torch.float32).remainder(97) * (party + 1)


# ---- tensors


@pytest.mark.parametrize("num_parties", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [0, 1, 7, 10_001])
def test_all_reduce_sums_in_place(num_parties: int, size: int) -> None:
    def act(federation: Federation) -> torch.Tensor:
        x = integers(size, federation.party)
        assert federation.all_reduce_(x) is x
        return x

    # Party p holds (p + 1) * i at place i: the sum is i * (1 + ... + N) = i * N (N + 1) / 2.
    expected = integers(size, 0) * (num_parties * (num_parties + 1) // 2)
    for result in run_parties(num_parties, act):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_all_reduce_keeps_dtype_and_shape(dtype: torch.dtype) -> None:
    def act(federation: Federation) -> torch.Tensor:
        return federation.all_reduce_(torch.full((2, 3), federation.party + 1, dtype=dtype))

    for result in run_parties(3, act):
        assert torch.equal(result, torch.full((2, 3), 6, dtype=dtype))


def test_all_reduce_of_a_large_tensor_is_split_and_whole_again(
    monkeypatch: pytest.MonkeyPatch, lane: str
) -> None:
    monkeypatch.setattr(federation, "_SPLIT_BYTES", 1024)
    messages = tapped(monkeypatch)
    results = run_parties(2, lambda federation: federation.all_reduce_(integers(1001, federation.party)))
    for result in results:
        assert torch.equal(result, integers(1001, 0) * 3)
    mine = [message for message in messages if message.party == 0]
    assert [message.values.numel() for message in mine] == [501, 500]
    lanes = len({message.lane for message in mine})
    assert lanes == (2 if lane == "gloo" else 1), "one group leaves cores idle"


def test_all_reduce_of_views_and_leaves() -> None:
    def act(federation: Federation) -> tuple[torch.Tensor, ...]:
        whole = torch.zeros(4, 6)
        across = whole.t()[1:5:2]  # columns 1 and 3: not contiguous
        across += federation.party + 1
        assert federation.all_reduce_(across) is across
        leaf = torch.nn.Parameter(torch.ones(3))
        with torch.no_grad():
            federation.all_reduce_(leaf)
        number = federation.all_reduce_(torch.tensor(2.0))
        return whole, leaf.detach(), number

    # Two parties put 1 and 2 into the columns: their sum is 3 there, and nothing else is written.
    expected = torch.zeros(4, 6)
    expected[:, [1, 3]] = 3
    for whole, leaf, number in run_parties(2, act):
        assert torch.equal(whole, expected)
        assert torch.equal(leaf, torch.full((3,), 2.0))
        assert number.shape == ()
        assert number == 4.0


@pytest.mark.parametrize("num_parties", [2, 3, 5])
def test_sums_have_the_same_bits_everywhere(num_parties: int) -> None:
    def act(federation: Federation) -> bytes:
        x = torch.randn(5003, generator=torch.Generator().manual_seed(federation.party))
        return federation.all_reduce_(x * 1e3).numpy().tobytes()

    first, *others = run_parties(num_parties, act)
    assert all(other == first for other in others)


def test_a_lazy_iterable_is_filled_while_the_tensors_before_are_on_their_way() -> None:
    def act(federation: Federation) -> torch.Tensor:
        whole = torch.zeros(60)
        asked: list[int] = []

        def parts() -> Iterator[torch.Tensor]:
            for index, part in enumerate(whole.split(10)):
                asked.append(index)
                part += federation.party + index
                yield part

        federation.all_reduce_each_(parts())
        assert asked == list(range(6))
        return whole

    # Parties 0, 1, 2 put index, index + 1, index + 2 into part ``index``: 3 * index + 3.
    expected = torch.arange(6.0).repeat_interleave(10) * 3 + 3
    for result in run_parties(3, act):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("source", [0, 1, 2])
def test_broadcast_overwrites_by_the_sources(source: int) -> None:
    def act(federation: Federation) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((2, 3), float(federation.party))
        across = torch.full((3, 2), float(federation.party)).t()
        assert federation.broadcast_(x, source) is x
        federation.broadcast_(across, source)
        return x, across

    for x, across in run_parties(3, act):
        assert torch.equal(x, torch.full((2, 3), float(source)))
        assert torch.equal(across, x)


def test_bytes_are_counted_where_tensors_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = tapped(monkeypatch)

    def act(federation: Federation) -> int:
        federation.broadcast_(torch.zeros(10), source=1)
        federation.all_reduce_(torch.zeros(7, dtype=torch.float64))
        federation.all_reduce_each_([torch.zeros(3), torch.zeros(5, dtype=torch.bfloat16)])
        return federation.bytes_sent

    # All parties: 7 * 8 + 3 * 4 + 5 * 2 = 78 bytes; party 1 sends the 40 bytes of the broadcast, too.
    assert run_parties(3, act) == [78, 118, 78]
    for party, expected in enumerate([78, 118, 78]):
        assert sum(m.values.nbytes for m in messages if m.party == party and m.sent) == expected


def test_a_party_alone_sends_nothing() -> None:
    federation = Federation(dist.HashStore(), 0, 1)
    x = torch.arange(3.0)
    assert federation.all_reduce_(x) is x
    assert federation.broadcast_(x) is x
    assert torch.equal(x, torch.arange(3.0))
    assert federation.gather_json("key", {"a": [1]}) == [{"a": [1]}]
    assert federation.bytes_sent == 0
    federation.close()


# ---- parts of different sizes


def sent_by(party: int, to: int) -> torch.Tensor:
    """What a party sends to another: its own numbers, and of some sizes nothing."""
    return 100.0 * party + 10 * to + torch.arange([3, 0, 5, 1][(party + 2 * to) % 4], dtype=torch.float32)


@pytest.mark.parametrize("num_parties", [1, 2, 3, 5])
def test_all_to_all_brings_each_party_its_part(num_parties: int) -> None:
    def act(federation: Federation) -> tuple[list[torch.Tensor], int]:
        parties = range(federation.num_parties)
        parts = [sent_by(federation.party, to) for to in parties]
        sizes = [sent_by(party, federation.party).numel() for party in parties]
        return federation.all_to_all(parts, sizes), federation.bytes_sent

    for party, (received, sent) in enumerate(run_parties(num_parties, act)):
        assert len(received) == num_parties
        for other, values in enumerate(received):
            assert torch.equal(values, sent_by(other, party))
        # 4 bytes for each scalar, but for what a party keeps.
        assert sent == 4 * sum(sent_by(party, to).numel() for to in range(num_parties) if to != party)


def test_all_to_all_of_nothing() -> None:
    def act(federation: Federation) -> list[torch.Tensor]:
        return federation.all_to_all([torch.zeros(0)] * 3, [0, 0, 0])

    for received in run_parties(3, act):
        assert [values.shape for values in received] == [(0,)] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_all_to_all_and_all_gather_keep_the_dtype(dtype: torch.dtype) -> None:
    def act(federation: Federation) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        mine = torch.full((2 + federation.party,), 1 + federation.party, dtype=dtype)
        return federation.all_to_all([mine, mine], [2, 3]), federation.all_gather(mine, [2, 3])

    for exchanged, gathered in run_parties(2, act):
        for values in (exchanged, gathered):
            assert torch.equal(values[0], torch.full((2,), 1, dtype=dtype))
            assert torch.equal(values[1], torch.full((3,), 2, dtype=dtype))


@pytest.mark.parametrize("sizes", [[4], [3, 1], [0, 5, 2], [2, 0, 0, 7], [0, 0]])
def test_all_gather_brings_every_part_to_all(sizes: list[int]) -> None:
    def act(federation: Federation) -> tuple[list[torch.Tensor], int]:
        mine = integers(sizes[federation.party], federation.party)
        gathered = federation.all_gather(mine, sizes)
        assert not mine.numel() or all(mine.data_ptr() != values.data_ptr() for values in gathered)
        return gathered, federation.bytes_sent

    for party, (gathered, sent) in enumerate(run_parties(len(sizes), act)):
        for other, values in enumerate(gathered):
            assert torch.equal(values, integers(sizes[other], other))
        assert sent == (4 * sizes[party] if len(sizes) > 1 else 0)


# ---- words


def test_words_arrive_in_the_order_of_the_parties() -> None:
    def act(federation: Federation) -> list[Any]:
        first = federation.gather_json("key", {"party": federation.party, "list": [1, "ö", None, 0.5]})
        if federation.party == 1:
            time.sleep(0.3)  # a party that is late must not read as what it said before
        return [*first, *federation.gather_json("key", federation.party * 10)]

    for words in run_parties(3, act):
        assert words == [{"party": p, "list": [1, "ö", None, 0.5]} for p in range(3)] + [0, 10, 20]


# ---- coming


@pytest.mark.parametrize("kind", ["file", "tcp"])
def test_any_store_will_do(kind: str, tmp_path: Path) -> None:
    # As in real life each party has a connection of its own: two parties cannot wait on one.
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if kind == "tcp" else None

    def connect() -> dist.Store:
        if host is not None:
            return dist.TCPStore("127.0.0.1", host.port, is_master=False)
        return dist.FileStore(str(tmp_path / "store"), 3)

    said: list[Any] = [None] * 3
    missed: list[Any] = [None] * 3

    def party(index: int) -> None:
        federation = Federation(connect(), index, 3, timeout_s=5)
        said[index] = federation.gather_json("party", index)
        assert float(federation.all_reduce_(torch.tensor(1.0 + index))) == 6.0
        federation.close()
        if index != 1:
            with pytest.raises(PartyLostError) as caught:
                Federation(connect(), index, 3, timeout_s=0.5)
            missed[index] = str(caught.value)

    in_threads([lambda i=i: party(i) for i in range(3)])
    assert said == [[0, 1, 2]] * 3
    assert all("party 1" in missed[index] for index in (0, 2))


def test_two_joinings_over_one_store() -> None:
    store = dist.HashStore()
    for generation in range(3):
        results = run_parties(
            3, lambda f, g=generation: f.all_reduce_(torch.tensor([f.party + g])), store=store
        )
        assert [int(result) for result in results] == [3 + 3 * generation] * 3


def test_joining_again_after_a_failure() -> None:
    store = dist.HashStore()

    def fail(federation: Federation) -> None:
        if federation.party == 0:
            raise OSError("power cut")
        federation.all_reduce_(torch.ones(1))

    failed = run_parties(2, fail, store=store, may_fail=True)
    assert [type(error) for error in failed] == [OSError, PartyLostError]
    again = run_parties(2, lambda federation: federation.all_reduce_(torch.ones(1)), store=store)
    assert [float(result) for result in again] == [2.0, 2.0]


def test_two_federations_at_once_do_not_meet() -> None:
    store = dist.HashStore()
    results: dict[str, list[Any]] = {}

    def run(name: str, num_parties: int) -> None:
        results[name] = run_parties(
            num_parties, lambda f: f.all_reduce_(torch.ones(1)), store=dist.PrefixStore(name, store)
        )

    in_threads([lambda: run("a", 2), lambda: run("b", 3)])
    assert [float(result) for result in results["a"]] == [2.0] * 2
    assert [float(result) for result in results["b"]] == [3.0] * 3


@pytest.mark.parametrize(("party", "num_parties"), [(-1, 2), (2, 2), (5, 2), (0, 0), (0, -1)])
def test_a_party_outside_the_federation_is_refused(party: int, num_parties: int) -> None:
    with pytest.raises(ValueError, match=rf"party={party} .* num_parties={num_parties}"):
        Federation(dist.HashStore(), party, num_parties)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_timeout_must_be_positive(timeout_s: float) -> None:
    with pytest.raises(ValueError, match=f"timeout_s={timeout_s} must be positive"):
        Federation(dist.HashStore(), 0, 2, timeout_s=timeout_s)


def test_a_party_that_does_not_join_is_named() -> None:
    store = dist.HashStore()
    errors: list[BaseException] = []

    def join(party: int) -> None:
        with pytest.raises(PartyLostError) as caught:
            Federation(store, party, 4, timeout_s=0.5)
        errors.append(caught.value)

    began = time.monotonic()
    in_threads([lambda: join(0), lambda: join(2)])
    assert time.monotonic() - began < SOON_S
    assert len(errors) == 2
    for error in errors:
        for words in ("joining", "0.5 s", "party 1, 3"):
            assert words in str(error)
    # The second may have learned it from the first, which told the cure.
    assert any("timeout_s" in str(error) for error in errors)


def test_without_a_launcher_the_federation_is_one_party() -> None:
    federation = Federation.from_env()
    assert (federation.party, federation.num_parties) == (0, 1)
    federation.close()


def test_only_the_speaker_of_a_party_may_join() -> None:
    with pytest.MonkeyPatch.context() as process:
        for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}.items():
            process.setenv(name, value)
        with pytest.raises(ValueError, match=r"Process 1 of party 1 must not join.*rank 0 speaks"):
            Federation.from_env(num_parties=2)


def test_a_rendezvous_out_of_reach_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    with pytest.MonkeyPatch.context() as process:
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
            process.setenv(name, value)
        process.setenv("MASTER_PORT", port)
        with pytest.raises(PartyLostError, match=rf"Rank 1 .* 127\.0\.0\.1:{port} within 1 s"):
            Federation.from_env(timeout_s=1)


def test_errors_are_one_family() -> None:
    assert issubclass(MismatchError, FederationError)
    assert issubclass(PartyLostError, FederationError)
    assert issubclass(FederationError, RuntimeError)


# ---- going


def test_after_closing_nothing_crosses() -> None:
    def act(federation: Federation) -> None:
        federation.close()
        federation.close()  # twice is no error
        with pytest.raises(FederationError, match=f"Party {federation.party} has left this federation"):
            federation.all_reduce_(torch.ones(1))
        with pytest.raises(FederationError, match="Join again"):
            federation.broadcast_(torch.ones(1))
        with pytest.raises(FederationError, match="Join again"):
            federation.all_to_all([torch.ones(1)] * 2, [1, 1])
        with pytest.raises(FederationError, match="Join again"):
            federation.all_gather(torch.ones(1), [1, 1])
        federation.abort("too late to matter")

    run_parties(2, act)


@pytest.mark.parametrize("num_parties", [1, 2])
def test_a_closed_federation_refuses_alone_as_well_as_together(num_parties: int) -> None:
    def act(federation: Federation) -> str:
        federation.close()
        parties = federation.num_parties
        with pytest.raises(FederationError, match="has left this federation"):
            federation.all_to_all([torch.ones(1)] * parties, [1] * parties)
        with pytest.raises(FederationError, match="has left this federation"):
            federation.all_gather(torch.ones(1), [1] * parties)
        with pytest.raises(FederationError) as caught:
            federation.all_reduce_(torch.ones(1))
        return str(caught.value)

    for party, message in enumerate(run_parties(num_parties, act)):
        assert f"Party {party} has left this federation" in message


def test_a_party_that_dies_while_others_wait_for_its_tensor() -> None:
    took: list[float] = []

    def act(federation: Federation) -> None:
        federation.enter("in round 4")
        if federation.party == 1:
            time.sleep(0.2)
            raise OSError("power cut")
        began = time.monotonic()
        try:
            federation.all_reduce_(torch.ones(1000))
        finally:
            took.append(time.monotonic() - began)

    results = run_parties(3, act, may_fail=True)
    for party in (0, 2):
        assert isinstance(results[party], PartyLostError)
        assert "Party 1 left the federation while in round 4: OSError: power cut" in str(results[party])
    assert max(took) < SOON_S


@pytest.mark.parametrize(
    "wait_for_others",
    [
        lambda federation: federation.all_to_all([torch.ones(2)] * 3, [2, 2, 2]),
        lambda federation: federation.all_gather(torch.ones(federation.party), [0, 1, 2]),
    ],
    ids=["all_to_all", "all_gather"],
)
def test_a_party_that_dies_while_others_wait_for_its_part(
    wait_for_others: Callable[[Federation], Any],
) -> None:
    took: list[float] = []

    def act(federation: Federation) -> None:
        federation.enter("in round 4")
        if federation.party == 1:
            time.sleep(0.2)
            raise OSError("power cut")
        began = time.monotonic()
        try:
            wait_for_others(federation)
        finally:
            took.append(time.monotonic() - began)

    results = run_parties(3, act, may_fail=True)
    for party in (0, 2):
        assert isinstance(results[party], PartyLostError)
        assert "Party 1 left the federation while in round 4: OSError: power cut" in str(results[party])
    assert max(took) < SOON_S


def test_a_party_that_dies_between_two_tensors() -> None:
    def act(federation: Federation) -> None:
        federation.enter("in round 2")

        def parts() -> Iterator[torch.Tensor]:
            yield torch.ones(10)
            if federation.party == 2:
                raise OSError("power cut")
            yield torch.ones(10)

        federation.all_reduce_each_(parts())

    results = run_parties(3, act, may_fail=True)
    assert isinstance(results[2], OSError), "a party's own error must not be blamed on the others"
    for party in (0, 1):
        assert isinstance(results[party], PartyLostError)
        assert "Party 2 left the federation while in round 2: OSError: power cut" in str(results[party])


def test_an_error_of_its_own_is_not_blamed_on_the_others() -> None:
    # A RuntimeError is what torch raises for a bad shape or lack of memory, here while a tensor is filled.
    def act(federation: Federation) -> None:
        def parts() -> Iterator[torch.Tensor]:
            yield torch.ones(10)
            if federation.party == 0:
                raise RuntimeError("out of memory")
            yield torch.ones(10)

        federation.all_reduce_each_(parts())

    results = run_parties(2, act, may_fail=True)
    assert type(results[0]) is RuntimeError, f"it became {results[0]!r}"
    assert "out of memory" in str(results[1])


def test_a_party_that_dies_while_others_wait_for_its_words() -> None:
    def act(federation: Federation) -> None:
        federation.enter("starting")
        if federation.party == 0:
            time.sleep(0.2)
            raise OSError("power cut")
        federation.gather_json("party_spec", {})

    began = time.monotonic()
    results = run_parties(3, act, may_fail=True)
    assert time.monotonic() - began < SOON_S
    for party in (1, 2):
        assert isinstance(results[party], PartyLostError)
        assert "Party 0 left the federation while starting: OSError: power cut" in str(results[party])


def test_a_party_that_says_nothing_is_named() -> None:
    done = threading.Event()

    def act(federation: Federation) -> None:
        if federation.party == 1:
            done.wait(SOON_S)
            federation.abort()
            return
        try:
            federation.gather_json("party_spec", {})
        finally:
            done.set()

    results = run_parties(2, act, timeout_s=0.5, may_fail=True)
    assert isinstance(results[0], PartyLostError)
    for words in ("0.5 s", "party 1", "party_spec", "timeout_s"):
        assert words in str(results[0])


def test_a_party_that_leaves_without_a_word() -> None:
    def act(federation: Federation) -> str:
        federation.enter("in round 0")
        if federation.party == 1:
            federation.abort()
            return ""
        with pytest.raises(PartyLostError) as caught:
            federation.all_reduce_(torch.ones(1))
        federation.abort()
        return str(caught.value)

    began = time.monotonic()
    results = run_parties(3, act)
    assert time.monotonic() - began < SOON_S
    for party in (0, 2):
        assert f"Party {party} lost the federation while in round 0" in results[party]
        assert "look at the end of its log" in results[party]


def test_a_late_party_costs_the_timeout_and_the_cure_is_named() -> None:
    done = threading.Event()

    def act(federation: Federation) -> None:
        federation.enter("in round 2")
        if federation.party == 1:
            done.wait(SOON_S)
        federation.enter("in round 3")
        try:
            federation.all_reduce_(torch.ones(1))
        finally:
            done.set()

    began = time.monotonic()
    results = run_parties(2, act, timeout_s=1, may_fail=True)
    assert time.monotonic() - began < SOON_S
    assert isinstance(results[0], PartyLostError)
    for words in ("in round 3", "1 s", "party 1 (in round 2)", "raise timeout_s"):
        assert words in str(results[0])
    assert isinstance(results[1], PartyLostError), "a party that comes too late must not compute alone"


def test_the_others_need_not_wait_to_part_from_a_party_that_has_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_coordinator, "_LEAVE_S", 6.0)

    def act(federation: Federation) -> float:
        if federation.party == 1:
            federation.abort("power cut")
        began = time.monotonic()
        federation.close()
        return time.monotonic() - began

    took = run_parties(3, act)
    assert "[party 0]" in caplog.text
    assert "[party 2]" in caplog.text
    assert max(took) < 3, "the store says that party 1 has left, so its goodbye will not come"


class MortalStore(dist.Store):
    """A store whose host can go away, as the one on party 0's host does when that host loses power."""

    def __init__(self) -> None:
        super().__init__()
        self._store = dist.HashStore()
        self.dead = False

    def _alive(self) -> dist.Store:
        if self.dead:
            raise dist.DistNetworkError("Connection reset by peer")
        return self._store

    def set(self, key: str, value: str) -> None:
        self._alive().set(key, value)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._alive().compare_set(key, expected, desired)

    def get(self, key: str) -> bytes:
        return self._alive().get(key)

    def add(self, key: str, value: int) -> int:
        return self._alive().add(key, value)

    def check(self, keys: list[str]) -> bool:
        return self._alive().check(keys)

    def wait(self, keys: list[str], *timeout: Any) -> None:
        self._alive().wait(keys, *timeout)

    def deleteKey(self, key: str) -> bool:
        return self._alive().delete_key(key)


@pytest.mark.parametrize(
    "wait_for_others",
    [
        lambda federation: federation.all_reduce_(torch.ones(1)),
        lambda federation: federation.broadcast_(torch.ones(1)),
        lambda federation: federation.gather_json("party_spec", {}),
        lambda federation: (federation.enter("in round 1"), federation.all_reduce_(torch.ones(1))),
    ],
    ids=["all_reduce_", "broadcast_", "gather_json", "enter"],
)
def test_a_party_that_takes_the_store_with_it(wait_for_others: Callable[[Federation], Any]) -> None:
    store = MortalStore()
    everybody_joined = threading.Barrier(3)

    def act(federation: Federation) -> None:
        everybody_joined.wait(SOON_S)
        if federation.party == 0:
            store.dead = True
            federation.abort()
            return
        while not store.dead:
            time.sleep(0.01)
        with pytest.raises(PartyLostError, match=f"Party {federation.party} lost the federation"):
            wait_for_others(federation)
        federation.abort("the store is gone, so nobody can be told; that must not hide the cause")

    began = time.monotonic()
    run_parties(3, act, store=store)
    assert time.monotonic() - began < SOON_S


def test_a_tls_that_gloo_does_not_have_is_refused_in_words() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_DEVICE_TRANSPORT", "tcp_tls")
        errors = run_parties(2, lambda federation: None, may_fail=True)
    assert all("torch's released builds do not have" in str(error) for error in errors)


def test_with_parties_that_have_not_come_nothing_is_exchanged() -> None:
    unjoined = Federation.unjoined(["a", "b"], 1, None)
    assert (unjoined.name, unjoined.num_parties, unjoined.place, unjoined.quorum) == ("b", 2, (1, 2), 2)
    with pytest.raises(RuntimeError):
        unjoined.all_reduce_(torch.zeros(1))


# ---- who waits says for whom


def test_the_first_that_is_here_says_who_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(polling, "FIRST_S", 0.1)
    store = dist.HashStore()

    def join(party: int) -> None:
        time.sleep(0.6 if party == 0 else 0.0)
        store_coordinator.StoreCoordinator(store, party, 3, timeout_s=30).wait_for_all()

    in_threads([partial(join, party) for party in range(3)])
    assert caplog.messages == ["[party 1] waits for party 0: 2 of 3 are here, up to 30 s"]


def test_who_waits_in_a_collective_says_what_the_others_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_coordinator, "_MONITOR_EVERY_S", 0.01)
    store = dist.HashStore()
    first, second = (store_coordinator.StoreCoordinator(store, party, 2, timeout_s=30) for party in (0, 1))
    first.enter("meeting for round 3")
    second.enter("training")
    time.sleep(0.1)  # their threads publish it
    with first.waiting(first_s=0.01), second.waiting(first_s=30):
        time.sleep(0.3)
    assert caplog.messages == ["[party 0] waits for party 1 (training)"]
    second.enter("meeting for round 4")
    time.sleep(0.1)  # the first waits no more
    assert len(caplog.messages) == 1
    first.close()
    second.close()


@pytest.mark.parametrize("party_size", [1, 2])
def test_of_each_host_one_says_for_whom_it_waits_whatever_the_launch_looks_like_now(party_size: int) -> None:
    """Four processes on the second of two hosts, whose launch transformers must not see."""
    found = []
    for local_rank in range(0, 4, party_size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pellm_lightning.comm.topology._hidden", {})
            launch = {
                "RANK": 4 + local_rank,
                "WORLD_SIZE": 8,
                "LOCAL_RANK": local_rank,
                "LOCAL_WORLD_SIZE": 4,
            }
            for name, value in launch.items():
                patch.setenv(name, str(value))
            topology = Topology.from_env(8 // party_size)
            hide_launch(topology)
            parties = (topology.party, topology.num_parties)
            found.append(store_coordinator.StoreCoordinator(dist.HashStore(), *parties, 1)._reminds({1}))
    assert found == [True] + [False] * (4 // party_size - 1)


def test_a_party_is_not_late_for_itself() -> None:
    """What it does is published a moment later: until then the store has what it did before."""
    store = dist.HashStore()
    store.set("at/0", "training")
    store.set("at/1", "training")
    coordinator = store_coordinator.StoreCoordinator(store, 0, 2, timeout_s=30)
    coordinator.phase = "in round 3"
    coordinator._reminder = polling.Reminder(first_s=0)
    coordinator._remind()
    late = coordinator.timed_out()
    assert late.parties == ("1",)
    assert "it waited 30 s for party 1 (training)." in str(late)


def test_one_thread_watches_all_rounds_and_ends_with_the_federation() -> None:
    def watching() -> int:
        return sum(thread.name == "waiting for parties" for thread in threading.enumerate())

    coordinator = store_coordinator.StoreCoordinator(dist.HashStore(), 0, 2, timeout_s=30)
    before = watching()
    for _ in range(3):
        with coordinator.waiting():
            assert watching() == before + 1
    coordinator.close()
    for _ in polling.polls(5):
        if watching() == before:
            break
    assert watching() == before


def test_who_comes_when_the_others_have_ended_is_told_where_the_result_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 1, "WORLD_SIZE": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, str(value))
        with pytest.raises(PartyLostError, match="have ended meanwhile, they have the result"):
            Federation.from_env(timeout_s=0.2)
