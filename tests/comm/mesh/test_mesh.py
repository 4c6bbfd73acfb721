"""Members as threads over loopback: sums to the bit, and every kind of bad luck and bad company."""

import contextlib
import json
import math
import os
import random
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from certificates import tls_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pellm_lightning.comm.errors import FederationError, MismatchError, PartyLostError
from pellm_lightning.comm.mesh import mesh
from pellm_lightning.comm.mesh.frames import (
    HEADER_BYTES,
    Incoming,
    Kind,
    Label,
    Link,
    Outgoing,
    UnexpectedFrameError,
)
from pellm_lightning.comm.mesh.mesh import Listener, Mesh
from pellm_lightning.comm.sockets import split_address

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
_groups = iter(range(10**9))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only there 127.0.0.2 is this host, too")


class Members:
    """Listeners of n members, and the meshes that they form."""

    def __init__(self, n: int, secure: bool = False) -> None:
        self.names = [f"clinic-{i}" for i in range(n)]
        self.tls = [tls_of(name) if secure else None for name in self.names]
        self.listeners = [
            Listener("127.0.0.1", name=name, roster=self.names, tls=tls)
            for name, tls in zip(self.names, self.tls, strict=True)
        ]
        self.addresses = [listener.address for listener in self.listeners]
        self.meshes: list[Mesh] = []

    def form(self, timeout_s: float = 20.0, **kwargs: Any) -> list[Mesh]:
        group = f"group-{next(_groups)}"
        self.meshes = at_all(
            range(len(self.names)), lambda rank: self.mesh(rank, group, timeout_s=timeout_s, **kwargs)
        )
        return self.meshes

    def mesh(self, rank: int, group: str, **kwargs: Any) -> Mesh:
        return Mesh(
            self.listeners[rank], group, rank, self.names, self.addresses, tls=self.tls[rank], **kwargs
        )

    def close(self) -> None:
        for one in self.meshes:
            one.abort()
        for listener in self.listeners:
            listener.close()


@contextlib.contextmanager
def members(n: int, secure: bool = False) -> Iterator[Members]:
    found = Members(n, secure)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def secure(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module", params=[(1, False), (2, True), (3, False), (4, True), (5, False)], ids=str)
def meshes(request: pytest.FixtureRequest) -> Iterator[list[Mesh]]:
    """Formed once, so that every example is one of a long sequence of mixed collectives."""
    with members(*request.param) as found:
        yield found.form()


def at_all(whom: Sequence, act: Callable[[Any], Any], may_fail: bool = False) -> list[Any]:
    """Act at all members at once; with `may_fail` an exception stands for the result."""
    results: list[Any] = [None] * len(whom)

    def run(index: int) -> None:
        try:
            results[index] = act(whom[index])
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(whom))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a member hangs"
    failed = [result for result in results if isinstance(result, BaseException)]
    if failed and not may_fail:
        raise failed[0]
    return results


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def settled(count: Callable[[], int], most: int) -> bool:
    """Whether a count comes down within a moment."""
    for _ in range(1000):
        if count() <= most:
            return True
        time.sleep(0.005)
    return False


def seeded(dtype: torch.dtype, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype in FLOATS:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * 100).to(dtype)
    return torch.randint(0, 100, (size,), generator=generator).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---- what collectives compute


def oracle(addends: Sequence[Tensor]) -> Tensor:
    """The sum in the order of the ranks in float64, rounded to the dtype after each addition.

    For two addends of at most half of float64's precision, that is the correctly rounded sum.
    """
    exact = torch.float64 if addends[0].dtype in FLOATS else torch.int64
    total = addends[0]
    for addend in addends[1:]:
        total = (total.to(exact) + addend.to(exact)).to(total.dtype)
    return total


@QUICK
@given(
    dtype=st.sampled_from(FLOATS + INTEGERS),
    size=st.one_of(st.integers(0, 12), st.integers(13, 5000), st.sampled_from([65537, 400_001])),
    seed=st.integers(0, 2**32),
)
def test_sums_are_the_oracles_to_the_bit(
    meshes: list[Mesh], dtype: torch.dtype, size: int, seed: int
) -> None:
    addends = [seeded(dtype, size, seed + rank) for rank in range(len(meshes))]
    sums = [addend.clone() for addend in addends]
    at_all(meshes, lambda mesh: mesh.all_reduce(sums[mesh.rank]))
    expected = oracle(addends)
    assert all(same_bits(total, expected) for total in sums)


def test_tensors_longer_than_the_ring_are_summed(secure: bool) -> None:
    with members(3, secure) as found:
        addends = [seeded(torch.float32, 3_000_017, rank) for rank in range(3)]
        sums = [addend.clone() for addend in addends]
        at_all(found.form(), lambda mesh: mesh.all_reduce(sums[mesh.rank]))
        assert all(same_bits(total, oracle(addends)) for total in sums)


def test_nan_has_the_same_bits_everywhere(meshes: list[Mesh]) -> None:
    sums = [torch.full((7,), float("nan")).copysign(torch.tensor(-1.0 if i % 2 else 1.0)) for i in range(5)]
    at_all(meshes, lambda mesh: mesh.all_reduce(sums[mesh.rank]))
    assert all(same_bits(total, sums[0]) for total in sums[: len(meshes)])


def test_shapes_and_gradients_do_not_matter(meshes: list[Mesh]) -> None:
    tensors = [torch.full((2, 3), rank + 1.0, requires_grad=True) for rank in range(len(meshes))]
    scalars = [torch.tensor(rank + 1.0) for rank in range(len(meshes))]
    at_all(meshes, lambda mesh: (mesh.all_reduce(tensors[mesh.rank]), mesh.all_reduce(scalars[mesh.rank])))
    n = len(meshes)
    assert all(torch.equal(t, torch.full((2, 3), n * (n + 1) / 2)) for t in tensors)
    assert all(t.item() == n * (n + 1) / 2 for t in scalars)


@QUICK
@given(
    dtype=st.sampled_from((*FLOATS, *INTEGERS, torch.bool, torch.complex64)),
    size=st.integers(0, 300),
    seed=st.integers(0, 2**32),
)
def test_broadcast(meshes: list[Mesh], dtype: torch.dtype, size: int, seed: int) -> None:
    source = seed % len(meshes)
    tensors = [seeded(torch.uint8, size, seed + rank).to(dtype) for rank in range(len(meshes))]
    expected = tensors[source].clone()
    at_all(meshes, lambda mesh: mesh.broadcast(tensors[mesh.rank], source))
    assert all(same_bits(tensor, expected) for tensor in tensors)


@QUICK
@given(data=st.data(), dtype=st.sampled_from(FLOATS + INTEGERS), seed=st.integers(0, 2**32))
def test_all_to_all(meshes: list[Mesh], data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
    n = len(meshes)
    sizes = data.draw(st.lists(st.lists(st.integers(0, 40), min_size=n, max_size=n), min_size=n, max_size=n))
    sent = [seeded(dtype, sum(row), seed + rank) for rank, row in enumerate(sizes)]
    got = [torch.zeros(sum(row[rank] for row in sizes), dtype=dtype) for rank in range(n)]

    def act(mesh: Mesh) -> None:
        mesh.all_to_all(got[mesh.rank], sent[mesh.rank], [row[mesh.rank] for row in sizes], sizes[mesh.rank])

    at_all(meshes, act)
    for rank in range(n):
        parts = [sent[other].split(sizes[other])[rank] for other in range(n)]
        assert same_bits(got[rank], torch.cat(parts))


def test_a_warm_mesh_keeps_its_scratch() -> None:
    with members(3) as found:
        formed = found.form()
        x = [torch.ones(2_000_000) for _ in range(3)]
        at_all(formed, lambda mesh: mesh.all_reduce(x[mesh.rank]))
        kept = [mesh._scratch.data_ptr() for mesh in formed]
        at_all(formed, lambda mesh: mesh.all_reduce(x[mesh.rank]))
        assert [mesh._scratch.data_ptr() for mesh in formed] == kept
        assert max(mesh._scratch.nbytes for mesh in formed) <= mesh._RINGS_BYTES


def test_twenty_four_members() -> None:
    with members(24) as found:
        formed = found.form()
        x = [torch.full((1000,), float(rank)) for rank in range(24)]
        at_all(formed, lambda mesh: mesh.all_reduce(x[mesh.rank]))
        assert all(torch.equal(total, torch.full((1000,), 276.0)) for total in x)  # 23 * 24 / 2


def test_ipv6() -> None:
    try:
        listeners = [Listener("::1", name=name, roster=["a", "b"]) for name in "ab"]
    except FederationError:
        pytest.skip("this host has no IPv6")
    assert listeners[0].address.startswith("[::1]:")
    x = [torch.ones(3), torch.ones(3)]

    def act(rank: int) -> None:
        addresses = [listener.address for listener in listeners]
        mesh = Mesh(listeners[rank], "six", rank, ["a", "b"], addresses, timeout_s=10)
        mesh.all_reduce(x[rank])
        mesh.abort()

    at_all([0, 1], act)
    assert x[0].tolist() == x[1].tolist() == [2, 2, 2]
    for listener in listeners:
        listener.close()


# ---- arguments


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 2},
        {"rank": -1},
        {"names": ["a", "a"]},
        {"addresses": ["127.0.0.1:1"]},
        {"timeout_s": 0},
        {"group": "g" * 5000},
        {"addresses": ["nowhere", "127.0.0.1:1"]},
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict) -> None:
    arguments = {"group": "g", "rank": 1, "names": ["a", "b"], "addresses": ["127.0.0.1:1", "127.0.0.1:2"]}
    with contextlib.closing(Listener("127.0.0.1", name="b", roster=["a", "b"])) as listener:
        before = descriptors()
        with pytest.raises(ValueError, match=r"give|Give|must"):
            Mesh(listener, **({"timeout_s": 1} | arguments | change))
        assert descriptors() == before


def test_tensors_that_do_not_fit_are_refused_and_harm_nobody() -> None:
    with members(2) as found:
        mesh = found.form()[0]
        for tensor in (
            torch.ones(4, 4).t(),
            torch.ones(2, device="meta"),
            torch.ones(4).to(torch.float8_e5m2),
        ):
            with pytest.raises(ValueError, match="cannot be sent"):
                mesh.all_reduce(tensor)
        with pytest.raises(ValueError, match="bool"):
            mesh.all_reduce(torch.ones(2, dtype=torch.bool))
        with pytest.raises(ValueError, match="source=2"):
            mesh.broadcast(torch.ones(2), 2)
        for out_sizes, sizes in (([1, 1], [1, 2]), ([1], [1]), ([1, -1], [1, 1]), ([2, 0], [1, 1])):
            with pytest.raises(ValueError, match="size"):
                mesh.all_to_all(torch.ones(2), torch.ones(2), out_sizes, sizes)
        x = [torch.ones(2), torch.ones(2)]
        at_all(found.meshes, lambda mesh: mesh.all_reduce(x[mesh.rank]))
        assert x[0].tolist() == [2, 2]


def test_a_port_in_use_is_told() -> None:
    with contextlib.closing(Listener("127.0.0.1", name="a", roster=["a"])) as listener:
        _, port = split_address(listener.address)
        with pytest.raises(FederationError, match=f"cannot listen on 127.0.0.1:{port}"):
            Listener("127.0.0.1", port, name="b", roster=["b"])
    Listener("127.0.0.1", port, name="b", roster=["b"]).close()


# ---- disagreement


def deviate(mesh: Mesh, how: str) -> None:
    wrong = mesh.rank == 2
    if how == "kind" and wrong:
        return mesh.broadcast(torch.ones(1000), 0)
    if how == "sequence" and wrong:
        mesh._sequence += 1
    size = {"size": 1001, "far size": 5_000_000, "empty": 0}.get(how, 1000) if wrong else 1000
    dtype = torch.int32 if how == "dtype" and wrong else torch.float32
    return mesh.all_reduce(torch.ones(size, dtype=dtype))


@pytest.mark.parametrize("how", ["kind", "sequence", "size", "far size", "empty", "dtype"])
def test_who_disagrees_is_named_by_all_others(how: str, secure: bool) -> None:
    with members(4, secure) as found:
        formed = found.form()
        before = time.monotonic()
        errors = at_all(formed, lambda mesh: deviate(mesh, how), may_fail=True)
        assert time.monotonic() - before < 3
        assert all(isinstance(error, MismatchError) for error in errors), errors
        assert [errors[i].parties for i in (0, 1, 3)] == [("clinic-2",)] * 3
        # Whoever has it from another says so; who told it is no less suspect than the one it blames.
        told = {errors[i].by for i in (0, 1, 3)}
        assert None in told
        assert told <= {None, "clinic-0", "clinic-1", "clinic-3"}
        assert all((error.by is not None) == (" got something unexpected " in str(error)) for error in errors)
        assert "clinic-2" in str(errors[0])


def test_who_disagrees_about_source_or_parts_is_named() -> None:
    for act in (
        lambda mesh: mesh.broadcast(torch.ones(10), 0 if mesh.rank else 1),
        lambda mesh: mesh.all_to_all(
            torch.ones(3 if mesh.rank else 4),
            torch.ones(3),
            [1, 1, 1] if mesh.rank else [1, 1, 2],
            [1, 1, 1],
        ),
    ):
        with members(3) as found:
            errors = at_all(found.form(), act, may_fail=True)
            assert isinstance(errors[0], MismatchError)
            # Others may be through before they hear of it.
            assert all(error is None or isinstance(error, MismatchError) for error in errors), errors


def test_a_broken_mesh_says_so_and_holds_no_descriptor() -> None:
    with members(3) as found:
        before = descriptors()
        errors = at_all(found.form(), lambda mesh: deviate(mesh, "size"), may_fail=True)
        assert all(isinstance(error, MismatchError) for error in errors)
        assert descriptors() == before
        with pytest.raises(FederationError, match="Form a new one"):
            found.meshes[0].all_reduce(torch.ones(1))


# ---- loss


@pytest.mark.parametrize("megabytes", [0.01, 40])
def test_who_goes_is_named_by_all(megabytes: float, secure: bool) -> None:
    size = int(megabytes * 250_000)
    gone_at: list[float] = []

    def act(mesh: Mesh) -> None:
        if mesh.rank == 1:
            if megabytes > 1:
                timer = threading.Timer(0.05, mesh.abort)
                timer.start()
                with contextlib.suppress(FederationError):
                    mesh.all_reduce(torch.ones(size))
                timer.join()
            mesh.abort()
            gone_at.append(time.monotonic())
        else:
            try:
                while True:
                    mesh.all_reduce(torch.ones(size))
            finally:
                gone_at.append(time.monotonic())

    with members(4, secure) as found:
        errors = at_all(found.form(), act, may_fail=True)
        others = [errors[rank] for rank in (0, 2, 3)]
        assert all(isinstance(error, PartyLostError) for error in others), others
        assert [error.parties for error in others] == [("clinic-1",)] * 3
        assert max(gone_at) - min(gone_at) < 1
        assert "127.0.0.1" in str(others[0])


def test_who_stalls_is_named_by_all(secure: bool) -> None:
    done = threading.Event()

    def act(mesh: Mesh) -> None:
        if mesh.rank == 0:
            done.wait(20)
            mesh.all_reduce(torch.ones(10))
        try:
            mesh.all_reduce(torch.ones(10))
        finally:
            if mesh.rank == 1:
                time.sleep(1.2)
                done.set()

    with members(3, secure) as found:
        begun = time.monotonic()
        errors = at_all(found.form(timeout_s=0.7), act, may_fail=True)
        assert 0.7 < time.monotonic() - begun < 6
        assert [error.parties for error in errors[1:]] == [("clinic-0",)] * 2
        assert "0.7 s" in str(errors[1]) or "0.7 s" in str(errors[2])
        # The one that was late is told so when it comes.
        assert isinstance(errors[0], PartyLostError)


def test_who_stops_in_the_middle_is_named_by_all() -> None:
    naps: list[float] = []

    def watch_of(rank: int) -> Callable[[], None]:
        return (lambda: time.sleep(naps.pop() if naps else 0)) if rank == 2 else (lambda: None)

    with members(3) as found:
        group = f"group-{next(_groups)}"
        found.meshes = at_all(
            range(3), lambda rank: found.mesh(rank, group, timeout_s=0.6, watch=watch_of(rank))
        )
        naps.append(2.0)
        for mesh in found.meshes:
            mesh._watched = 0.0
        errors = at_all(found.meshes, lambda mesh: mesh.all_reduce(torch.ones(10_000_000)), may_fail=True)
        assert [error.parties for error in errors[:2]] == [("clinic-2",)] * 2, errors


@pytest.mark.parametrize("kind", ["part", "sum"])
def test_a_drip_is_no_progress(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A byte now and then: it is named by all after the timeout, as if it had sent nothing."""
    send, drips, last = Link._send, threading.local(), [0.0]
    parts_bytes = 2 * 4 * 10_000  # of the tensor below, a third for each of the two others

    def one(self: Link, data: memoryview) -> int:
        if getattr(drips, "after", math.inf) > 0:
            sent = send(self, data)
            drips.after = getattr(drips, "after", math.inf) - sent
            return sent
        self.events |= mesh.EVENT_WRITE
        if time.monotonic() - last[0] < 0.05:
            return 0
        last[0] = time.monotonic()
        return send(self, data[:1])

    monkeypatch.setattr(Link, "_send", one)
    with members(3) as found:

        def act(one: Mesh) -> float:
            drips.after = math.inf if one.rank != 2 else 0 if kind == "part" else parts_bytes
            began = time.monotonic()
            try:
                one.all_reduce(torch.ones(30_000))
            finally:
                took[one.rank] = time.monotonic() - began

        took: dict[int, float] = {}
        errors = at_all(found.form(timeout_s=0.8), act, may_fail=True)
        assert [error.parties for error in errors[:2]] == [("clinic-2",)] * 2, errors
        assert max(took[0], took[1]) < 0.8 + 2.0


def test_a_slow_connection_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower than the timeout allows for all of it, but faster than a drip."""
    send, last = Link._send, [0.0]

    def some(self: Link, data: memoryview) -> int:
        self.events |= mesh.EVENT_WRITE
        if time.monotonic() - last[0] < 0.05:
            return 0
        last[0] = time.monotonic()
        return send(self, data[:4000])

    monkeypatch.setattr(Link, "_send", some)
    with members(2) as found:
        x = [torch.ones(20_000), torch.ones(20_000)]
        at_all(found.form(timeout_s=0.4), lambda one: one.all_reduce(x[one.rank]))
        assert all(torch.equal(one, torch.full((20_000,), 2.0)) for one in x)


def test_a_name_that_resolves_slowly_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer chooses the name: only the link to it waits, and no longer than the timeout."""
    resolve, over = socket.getaddrinfo, threading.Event()

    def slow(host: Any, *rest: Any, **kwargs: Any) -> Any:
        if host == "slow.invalid":
            over.wait(20)
            raise socket.gaierror("no such host")
        return resolve(host, *rest, **kwargs)

    watched: list[float] = []
    with members(3) as found:
        found.addresses[0] = "slow.invalid:7"
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *rest, flags=0, **kwargs: (
                resolve(host, *rest, flags=flags, **kwargs) if flags else slow(host, *rest, **kwargs)
            ),
        )
        began = time.monotonic()
        with pytest.raises(PartyLostError, match=r"the name 'slow\.invalid' is not resolved"):
            found.mesh(1, "g", timeout_s=0.6, watch=lambda: watched.append(time.monotonic()))
        over.set()
        assert time.monotonic() - began < 3
        assert len(watched) >= 3, "it looks after the others meanwhile"


def test_an_address_that_leads_back_is_told() -> None:
    with members(2) as found:
        found.addresses[0] = found.addresses[1]
        with pytest.raises(
            PartyLostError, match=r"leads back to this party itself.*give party clinic-0 'listen'"
        ):
            found.mesh(1, "g", timeout_s=0.2)


def test_whoever_does_not_come_is_named() -> None:
    with members(3) as found:
        before = descriptors()
        with pytest.raises(PartyLostError, match="it has not connected") as caught:
            found.mesh(1, "nobody", timeout_s=0.3)
        assert caught.value.parties == ("clinic-0", "clinic-2")
        # What still waits at clinic-0's listener is one connection at most.
        assert settled(descriptors, before + 1)


def test_a_lower_rank_may_come_later() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    names, addresses = ["a", "b"], [f"localhost:{port}", "127.0.0.1:1"]
    x = [torch.ones(2), torch.ones(2)]

    def act(rank: int) -> None:
        if rank == 0:
            time.sleep(0.4)
        listener = Listener("127.0.0.1", port if rank == 0 else 0, name=names[rank], roster=names)
        if rank == 0:
            time.sleep(0.3)
        mesh = Mesh(listener, "late", rank, names, addresses, timeout_s=10)
        mesh.all_reduce(x[rank])
        mesh.abort()
        listener.close()

    at_all([0, 1], act)
    assert x[0].tolist() == x[1].tolist() == [2, 2]


# ---- watch and abort


def test_what_watch_raises_passes_on(secure: bool) -> None:
    calls: list[float] = []

    def watch() -> None:
        calls.append(time.monotonic())
        if len(calls) == 5:
            raise KeyError("decided")

    with members(2, secure) as found:
        group = f"group-{next(_groups)}"
        found.meshes = at_all(
            range(2),
            lambda rank: found.mesh(rank, group, timeout_s=20, **({"watch": watch} if rank == 0 else {})),
        )
        calls.clear()
        begun = time.monotonic()
        with pytest.raises(KeyError, match="decided"):
            found.meshes[0].all_reduce(torch.ones(5))
        assert (
            max(b - a for a, b in zip([begun, *calls], calls, strict=False)) < 0.4
        )  # 0.2, on a busy machine
        with pytest.raises(PartyLostError) as caught:
            found.meshes[1].all_reduce(torch.ones(5))
        assert caught.value.parties == ("clinic-0",)


def test_whom_watch_has_lost_is_told_to_the_others() -> None:
    def watch() -> None:
        if formed.is_set():
            raise PartyLostError("its heart has stopped", parties=["clinic-2"])

    formed = threading.Event()
    with members(3) as found:
        group = f"group-{next(_groups)}"
        found.meshes = at_all(
            range(3),
            lambda rank: found.mesh(rank, group, timeout_s=20, **({"watch": watch} if rank == 0 else {})),
        )
        formed.set()
        errors = at_all(found.meshes[:2], lambda mesh: mesh.all_reduce(torch.ones(5)), may_fail=True)
        assert "heart" in str(errors[0])
        assert "clinic-0 " in str(errors[1])
        assert errors[1].parties == ("clinic-2",)


def test_watch_can_raise_while_forming_and_abort_in_the_middle() -> None:
    def watch() -> None:
        raise KeyError("decided")

    with members(2) as found:
        before = descriptors()
        with pytest.raises(KeyError, match="decided"):
            found.mesh(0, "alone", timeout_s=20, watch=watch)
        assert settled(descriptors, before)
        group = f"group-{next(_groups)}"
        holder: list[Mesh] = []
        found.meshes = at_all(
            range(2),
            lambda rank: found.mesh(rank, group, timeout_s=20, watch=lambda: [m.abort() for m in holder]),
        )
        holder.append(found.meshes[0])
        with pytest.raises(FederationError, match="abort"):
            found.meshes[0].all_reduce(torch.ones(5))


def test_abort_from_another_thread(secure: bool) -> None:
    with members(2, secure) as found:
        before = descriptors()
        mesh = found.form()[0]
        timer = threading.Timer(0.2, mesh.abort)
        timer.start()
        begun = time.monotonic()
        with pytest.raises(FederationError, match="abort"):
            mesh.all_reduce(torch.ones(5_000_000))
        assert time.monotonic() - begun < 1
        timer.join()
        mesh.abort()
        found.meshes[1].abort()
        assert descriptors() == before


# ---- strangers


def hello(name: Any, group: Any = "g") -> bytes:
    words = json.dumps({"from": name, "group": group}).encode()
    return struct.pack("!4sBH", b"PeLH", 1, len(words)) + words


def hung_up(sock: socket.socket) -> bool:
    """Whether the other end hangs up without having said a word."""
    sock.settimeout(8)
    with sock:
        try:
            return sock.recv(100) == b""
        except OSError as error:
            return not isinstance(error, TimeoutError)


def call(address: str) -> socket.socket:
    return socket.create_connection(split_address(address))


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x00" * 100,
    hello("stranger"),
    hello("clinic-0"),  # that is the listener itself
    hello(7),
    hello("clinic-1", None),
    b"PeLH\x02\x00\x02{}",  # another version
    b"PeLH\x01\xff\xff",  # longer than a greeting may be
    b"PeLH\x01\x00\x02[]",
    b"PeLH\x01\x00\x02{}",
    b"PeLH\x01\x00\x02\xff\xff",
    struct.pack("!4sBH", b"PeLH", 1, 1000) + b"[" * 1000,
]


@pytest.mark.parametrize("said", GARBAGE)
def test_garbage_is_hung_up_on(said: bytes) -> None:
    with members(2) as found:
        sock = call(found.addresses[0])
        sock.sendall(said)
        assert hung_up(sock)


def test_strangers_with_and_without_certificates_learn_nothing() -> None:
    with members(2, secure=True) as found:
        address = found.addresses[0]
        anonymous = ssl.create_default_context()
        anonymous.check_hostname, anonymous.verify_mode = False, ssl.CERT_NONE
        strangers = (tls_of("clinic-1", "theirs"), tls_of("stranger"), tls_of("clinic-7"))
        for context in (anonymous, *(tls.client_context for tls in strangers)):
            with contextlib.suppress(OSError), context.wrap_socket(call(address)) as sock:
                sock.sendall(hello("clinic-1"))
                assert hung_up(sock)
        plain = call(address)
        plain.sendall(hello("clinic-1"))
        plain.settimeout(8)
        answer = b""
        with plain, contextlib.suppress(ConnectionResetError):
            answer = plain.recv(100)
        assert len(answer) < 20  # at most an alert of TLS, that there was no handshake
        assert found.listeners[0].take("clinic-1", "g") is None


def test_a_tls_client_of_a_plain_listener_is_hung_up_on() -> None:
    with members(2) as found:
        with pytest.raises(OSError):  # noqa: PT011  # whatever the platform calls it
            tls_of("clinic-1").client_context.wrap_socket(call(found.addresses[0]))
        group = found.form()
        at_all(group, lambda mesh: mesh.all_reduce(torch.ones(3)))


@pytest.mark.parametrize("rank", [0, 1], ids=["callee", "caller"])
def test_tls_at_one_end_only_is_told_at_both(rank: int) -> None:
    with members(2) as found:
        found.tls[rank] = tls_of(found.names[rank])
        found.listeners[rank].close()
        found.listeners[rank] = Listener(
            "127.0.0.1", name=found.names[rank], roster=found.names, tls=found.tls[rank]
        )
        found.addresses[rank] = found.listeners[rank].address
        errors = at_all([0, 1], lambda rank: found.mesh(rank, "g", timeout_s=0.3), may_fail=True)
    assert all(isinstance(error, PartyLostError) for error in errors)
    assert all("all parties use TLS" in str(error) for error in errors)
    why = "sends no greeting of this protocol" if rank else "SSL"
    assert why in str(errors[0]), "who is called knows whom it has turned away"


@pytest.mark.parametrize("address", ["x" * 64 + ":1", "clinic..org:1", "a\0b:1"])
def test_an_address_that_cannot_be_is_told(address: str) -> None:
    with members(2) as found:
        found.addresses[0] = address
        with pytest.raises(PartyLostError, match=r"clinic-0 \("):
            found.mesh(1, "g", timeout_s=0.1)
    with pytest.raises(FederationError, match="cannot listen on"):
        Listener(address.removesuffix(":1"), name="a", roster=["a", "b"])


@LINUX
def test_each_members_addresses_are_tried_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that have two addresses each, one is not there: the other is found all the same."""
    resolve = socket.getaddrinfo

    def two(host: str, port: int, **kwargs: Any) -> list:
        return [*resolve("127.0.0.9", port, **kwargs), *resolve("127.0.0.1", port, **kwargs)]

    with members(3) as found:
        for rank in (0, 1):
            found.listeners[rank].close()
            found.listeners[rank] = Listener("127.0.0.1", name=found.names[rank], roster=found.names)
            found.addresses[rank] = found.listeners[rank].address
        found.listeners[0].close()
        monkeypatch.setattr(socket, "getaddrinfo", two)
        with pytest.raises(PartyLostError) as caught:
            found.mesh(2, "g", timeout_s=0.3)
        assert len(found.listeners[1]._waiting["clinic-2"]) == 1, caught.value


@LINUX
def test_a_crowd_crowds_out_itself() -> None:
    with members(2) as found:
        slow = call(found.addresses[0])
        said = hello("clinic-1", "g")
        slow.sendall(said[:9])
        source = ("127.0.0.2", 0)
        with contextlib.ExitStack() as stack:
            for _ in range(300):
                address = split_address(found.addresses[0])
                stack.enter_context(socket.create_connection(address, source_address=source))
            assert settled(lambda: 256 - len(found.listeners[0]._handshakes), 0)
            slow.sendall(said[9:])
            assert settled(lambda: 1 - len(found.listeners[0]._waiting.get("clinic-1", {})), 0)
        slow.close()


def test_a_member_at_anothers_address_is_not_taken_for_it(secure: bool) -> None:
    with members(3, secure) as found:
        found.addresses[0] = found.addresses[1]
        errors = at_all([1, 2], lambda rank: found.mesh(rank, "g", timeout_s=0.5), may_fail=True)
        assert all(isinstance(error, PartyLostError) for error in errors)
        assert "clinic-0" in errors[1].parties


def test_strangers_do_not_disturb_members(secure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pellm_lightning.comm.mesh.listener._GREETING_S", 1.0)
    threads, before = threading.active_count(), descriptors()
    stop = threading.Event()

    def molest(address: str) -> None:
        generator = random.Random(0)
        while not stop.is_set():
            with contextlib.suppress(OSError), call(address) as sock:
                sock.sendall(generator.choice([*GARBAGE, generator.randbytes(300), b"\x16\x03\x01"]))
                time.sleep(0.005)

    with members(3, secure) as found:
        silent = [call(found.addresses[0]) for _ in range(300)]
        pests = [threading.Thread(target=molest, args=(address,)) for address in found.addresses]
        for pest in pests:
            pest.start()
        try:
            for _ in range(3):
                begun = time.monotonic()
                x = [torch.ones(100_000) for _ in range(3)]
                at_all(found.form(), lambda mesh, x=x: mesh.all_reduce(x[mesh.rank]))
                assert all(total.eq(3).all() for total in x)
                assert time.monotonic() - begun < 3
                assert len(found.listeners[0]._handshakes) <= 256
                for mesh in found.meshes:
                    mesh.abort()
        finally:
            stop.set()
            for pest in pests:
                pest.join()
            # The silent ones time out in the end.
            ended = settled(lambda: len(found.listeners[0]._handshakes), 0)
            for sock in silent:
                sock.close()
        assert ended
    assert settled(descriptors, before)
    assert threading.active_count() == threads


def test_a_slow_greeting_holds_up_nobody_and_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pellm_lightning.comm.mesh.listener._GREETING_S", 1.0)
    with members(2) as found:
        slow = call(found.addresses[0])
        begun = time.monotonic()
        said = iter(hello("clinic-1", "x" * 500))
        at_all(found.form(), lambda mesh: mesh.all_reduce(torch.ones(3)))
        with contextlib.suppress(OSError):
            while time.monotonic() - begun < 10:
                slow.send(bytes([next(said)]))
                time.sleep(0.1)
        assert 0.9 < time.monotonic() - begun < 4
        slow.close()


def test_the_newest_connection_of_a_member_wins_and_few_wait() -> None:
    with members(2) as found:
        listener = found.listeners[0]
        socks, newest = [], None
        for group in ("g", "g", "h", "i", "j", "k"):
            socks.append(call(listener.address))
            socks[-1].sendall(hello("clinic-1", group))
            waiting = lambda g=group: listener._waiting.get("clinic-1", {}).get(g)  # noqa: E731
            assert settled(lambda of=waiting, last=newest: 1 if of() in (None, last) else 0, 0)
            newest = waiting()
        assert hung_up(socks[0])  # the second of g came
        assert hung_up(socks[1])  # and four others
        assert listener.take("clinic-1", "g") is None
        assert listener.take("clinic-9", "k") is None
        taken = listener.take("clinic-1", "k")
        assert taken is not None
        assert listener.take("clinic-1", "k") is None
        taken.close()
        for sock in socks:
            sock.close()


@settings(max_examples=150, deadline=None)
@given(
    said=st.one_of(st.binary(max_size=400), st.binary(max_size=60).map(lambda b: hello("clinic-1")[:-3] + b))
)
def test_random_bytes_do_not_harm_a_listener(said: bytes) -> None:
    listener = _fuzzed()
    with call(listener.address) as sock, contextlib.suppress(OSError):
        sock.sendall(said)
    with call(listener.address) as sock:
        sock.sendall(hello("clinic-1", "after"))
        assert settled(lambda: 0 if "after" in listener._waiting.get("clinic-1", {}) else 1, 0)
        taken = listener.take("clinic-1", "after")
        assert taken is not None
        taken.close()


_kept: list[Listener] = []


def _fuzzed() -> Listener:
    if not _kept:
        _kept.append(Listener("127.0.0.1", name="clinic-0", roster=["clinic-0", "clinic-1"]))
    return _kept[0]


@pytest.fixture(scope="module", autouse=True)
def _close_kept() -> Iterator[None]:
    yield
    for listener in _kept:
        listener.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_bytes_of_a_member_end_in_an_error(data: st.DataObject) -> None:
    """A member of the roster that has gone mad: cut, changed or random frames after a good greeting."""
    label = Label(Kind.PART, 1, 0, 2, 40, 20)
    good = label.pack() + struct.pack("!I", 20) + bytes(20)
    how = data.draw(st.sampled_from(["random", "cut", "changed"]))
    if how == "random":
        said = data.draw(st.binary(max_size=200))
    elif how == "cut":
        said = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        place, value = data.draw(st.integers(0, HEADER_BYTES - 1)), data.draw(st.integers(1, 255))
        said = good[:place] + bytes([good[place] ^ value]) + good[place + 1 :]
    listener = _fuzzed()
    with call(listener.address) as sock:
        sock.sendall(hello("clinic-1", "fuzz"))
        mesh = Mesh(listener, "fuzz", 0, ["clinic-0", "clinic-1"], ["127.0.0.1:1"] * 2, timeout_s=5)
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        with pytest.raises(FederationError) as caught:
            mesh.all_reduce(torch.ones(10))
    assert caught.value.parties == ("clinic-1",)


def test_no_growth_over_two_hundred_meshes() -> None:
    with members(3) as found:
        x = [torch.ones(10) for _ in range(3)]
        before: list[int] = []
        for round_ in range(200):
            at_all(found.form(), lambda mesh: mesh.all_reduce(x[mesh.rank]))
            for mesh in found.meshes:
                mesh.abort()
            if round_ in (9, 199):
                before.append(descriptors())
                before.append(threading.active_count())
        assert before[:2] == before[2:]
        assert all(not waiting for listener in found.listeners for waiting in listener._waiting.values())


# ---- frames


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(0, 200), ring=st.integers(1, 50))
def test_a_message_arrives_in_any_pieces(seed: int, size: int, ring: int) -> None:
    dice = random.Random(seed)  # hundreds of draws an example, of which hypothesis makes 8 s

    def up_to(most: int) -> int:
        return dice.choice([1, most, dice.randint(1, most)])

    label = Label(Kind.PART, 8, 0, 1, size, size)
    sent = random.Random(size).randbytes(size)
    going = Outgoing(label, memoryview(sent), ready=0)
    room = bytearray(ring)
    coming = Incoming(label, memoryview(room))
    on_the_way, got = b"", b""
    while not coming.is_done:
        going.ready = min(size, going.ready + up_to(300))
        while len(piece := going.upcoming()):
            some = up_to(len(piece))
            on_the_way += piece[:some].tobytes()
            going.advance(some)
        while on_the_way and (into := coming.buffer()):
            some = up_to(min(len(into), len(on_the_way)))
            into[:some] = on_the_way[:some]
            before = coming.received
            coming.advance(some)
            on_the_way = on_the_way[some:]
            got += bytes(room[place % ring] for place in range(before, coming.received))
            coming.freed = dice.choice(
                [coming.freed, coming.received, dice.randint(coming.freed, coming.received)]
            )
        coming.freed = coming.received
    assert going.is_done
    assert got == sent
    assert not on_the_way


def test_a_frame_that_claims_too_much_is_refused_before_anything_is_read() -> None:
    label = Label(Kind.PART, 8, 0, 1, 10, 10)
    for length in (0, 11, 2**32 - 1):
        coming = Incoming(label, memoryview(bytearray(10)))
        coming.buffer()[:] = label.pack() + struct.pack("!I", length)
        with pytest.raises(UnexpectedFrameError):
            coming.advance(HEADER_BYTES)


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("::1", False), ("0.0.0.0", True)])
def test_whoever_listens_openly_is_warned(host: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    Listener(host, name="a", roster=["a", "b"]).close()
    assert ("[party a] listens at 0.0.0.0" in caplog.text) == warned
    Listener(host, name="a", roster=["a", "b"], tls=tls_of("a")).close()
    assert caplog.text.count("listens at") == warned
