"""Parties of one host exchange in its memory: the bits of Gloo's sums, and what else must be as there."""

import errno
import json
import logging
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fork_server import python
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import process_environ
from party_threads import in_threads, run_parties
from paths import SCRIPTS
from torch import Tensor

from pellm_lightning import Federation
from pellm_lightning.comm import MismatchError, PartyLostError
from pellm_lightning.comm.torchrun import host_sockets, shared_memory
from pellm_lightning.comm.torchrun.host_sockets import HostSockets
from pellm_lightning.comm.torchrun.lane import LEFT
from pellm_lightning.comm.torchrun.shared_memory import SWITCH, SharedMemoryLane

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8]
Values = tuple[torch.dtype, int]


def on_both(num_parties: int, act: Callable[[Federation], Any]) -> tuple[list[Any], list[Any]]:
    """Return what the parties come to in shared memory, and over Gloo."""
    results = []
    for switch in "10":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SWITCH, switch)

            def checked(federation: Federation, switch: str = switch) -> Any:
                assert is_shared(federation) == (switch == "1")
                return act(federation)

            results.append(run_parties(num_parties, checked))
    return results[0], results[1]


def is_shared(federation: Federation) -> bool:
    return isinstance(federation._lanes[0], SharedMemoryLane)


def values(dtype: torch.dtype, size: int, seed: int) -> Tensor:
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 40
    return (drawn.abs() if dtype == torch.uint8 else drawn).to(dtype)


# ---- the same as over Gloo


sizes = st.one_of(st.integers(0, 40), st.integers(0, 3000), st.sampled_from([1 << 18, 700_001, 1_200_003]))


@settings(max_examples=12)
@given(num_parties=st.integers(2, 5), tensors=st.lists(st.tuples(st.sampled_from(DTYPES), sizes), max_size=4))
def test_sums_have_the_bits_of_gloos(num_parties: int, tensors: list[Values]) -> None:
    def act(federation: Federation) -> list[Tensor]:
        mine = [values(*kind, seed=10 * index + federation.party) for index, kind in enumerate(tensors)]
        federation.all_reduce_each_(mine[::2])
        for tensor in mine[1::2]:
            federation.all_reduce_(tensor)
        return mine

    shared, gloo = on_both(num_parties, act)
    for party in [*shared, *gloo]:
        for tensor, expected in zip(party, gloo[0], strict=True):
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)


@settings(max_examples=10)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 7, 1000, 300_001]), min_size=2, max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_parts_arrive_as_over_gloo(lengths: list[int], dtype: torch.dtype) -> None:
    num_parties = len(lengths)

    def act(federation: Federation) -> list[Tensor]:
        party = federation.party
        mine = values(dtype, lengths[party], seed=party)
        # Party p sends party q the last of its values, as many as q has, if it has so many.
        sent = [mine[len(mine) - min(len(mine), other) :] for other in lengths]
        received = federation.all_to_all(sent, [min(lengths[party], other) for other in lengths])
        whole = values(dtype, max(lengths), seed=party)
        federation.broadcast_(whole, source=num_parties - 1)
        return [*received, *federation.all_gather(mine, lengths), whole]

    shared, gloo = on_both(num_parties, act)
    for party, expected in zip(shared, gloo, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(party, expected, strict=True))


def test_metadata_of_any_length_arrives() -> None:
    lengths = [3, 100_000, 700]

    def act(federation: Federation) -> list[int]:
        assert is_shared(federation)
        said = {"words": "x" * lengths[federation.party]}
        joined = federation.join_quorum("metadata", None, said).metadata
        return [len(of_party["words"]) for of_party in joined.values()]

    assert run_parties(3, act) == [lengths] * 3


def test_who_differs_is_told_so_where_gloo_would_end_a_process() -> None:
    def act(federation: Federation) -> None:
        assert is_shared(federation)
        federation.all_reduce_(torch.zeros(5 + federation.party))

    for error in run_parties(2, act, may_fail=True):
        assert isinstance(error, MismatchError | PartyLostError)
        assert "all_reduce of 5 x torch.float32, all_reduce of 6 x torch.float32" in str(error)


Act = Callable[[Federation], Any]
ONE, WHOLE = torch.ones(1), torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("acts", "words"),
    [
        ([lambda f: f.barrier(), lambda f: f.all_reduce_(ONE.clone())], "barrier, all_reduce of 1"),
        ([lambda f: f.share_memory(64), lambda f: f.barrier()], "share of 64 bytes, barrier"),
        ([lambda f: f.share_memory(64), lambda f: f.share_memory(128)], "share of 64 bytes, share of 128"),
        (
            [lambda f: f.join_quorum("rest", None, {}), lambda f: f.barrier()],
            "all_gather_bytes of 512, barrier",
        ),
        ([lambda f: f.all_to_all([ONE] * 2, [1] * 2), lambda f: f.barrier()], "all_to_all of .*32, barrier"),
        (
            [lambda f: f.all_to_all([ONE] * 2, [1] * 2), lambda f: f.all_to_all([WHOLE[:1]] * 2, [1] * 2)],
            "all_to_all of torch.float32, all_to_all of torch.int64",
        ),
        (
            [lambda f, n=n: f.all_to_all([ONE] * 2, [1, n]) for n in (2, 1)],
            "Party 1 sends 1 scalars to party 0, .* 2",
        ),
        ([lambda f: f.all_gather(ONE, [1, 2])] * 2, r"gather 1, 1 scalars, but expect \[1, 2\]"),
        (
            [lambda f: f.all_gather(ONE, [1, 2]), lambda f: f.all_gather(WHOLE, [1, 2])],
            r"all_gather of \[1, 2\] x torch.float32, all_gather of \[1, 2\] x torch.int64",
        ),
        ([lambda f, n=n: f.broadcast_(ONE.clone(), n) for n in (0, 1)], "from 0 of 1 x .*, broadcast from 1"),
    ],
)
def test_all_must_call_the_same_collectives(acts: list[Act], words: str) -> None:
    errors = run_parties(2, lambda federation: acts[federation.party](federation), may_fail=True)
    assert all(isinstance(error, MismatchError | PartyLostError) for error in errors), errors
    assert any(re.search(words, str(error)) for error in errors if isinstance(error, MismatchError)), errors


def test_an_uneven_gather_copies_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedMemoryLane, "all_to_all", None)

    def act(federation: Federation) -> list[float]:
        mine = torch.full((federation.party,), federation.party + 1.0)
        return torch.cat(federation.all_gather(mine, [0, 1, 2])).tolist()

    assert run_parties(3, act) == [[2.0, 3.0, 3.0]] * 3


# ---- memory that all have mapped


def test_memory_is_one_for_all_and_a_barrier_orders_it() -> None:
    def act(federation: Federation) -> list[float]:
        memory = federation.share_memory(4096)
        assert memory is not None
        numbers = memory.view(torch.float32)
        assert not numbers.any()
        federation.barrier()
        seen = []
        for turn in range(20):
            numbers[federation.party] = 10 * turn + federation.party
            federation.barrier()
            seen.append(float(numbers[:3].sum()))
            federation.barrier()
        return seen

    # 10 t, 10 t + 1 and 10 t + 2 in turn t.
    assert run_parties(3, act) == [[30.0 * turn + 3 for turn in range(20)]] * 3


def test_memory_that_one_party_does_not_want_is_nobodys() -> None:
    def act(federation: Federation) -> Tensor | None:
        return federation.share_memory(4096, willing=federation.party != 1)

    assert run_parties(3, act) == [None] * 3


# ---- where there is none


def no_space(descriptor: int, offset: int, size: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_without_memory_all_use_gloo_and_one_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no_space)

    def act(federation: Federation) -> float:
        assert not is_shared(federation)
        return float(federation.all_reduce_(torch.tensor(1.0 + federation.party)))

    assert run_parties(3, act) == [6.0] * 3
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "cannot share 6 MB of its memory (party 0: [Errno 28] No space left on device)" in line
    assert "docker run --memory" in line


def test_one_that_cannot_map_it_takes_all_to_gloo(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    received = HostSockets.exchange

    def fail_at_one(sockets: HostSockets, message: bytes, files: list[int] | None = None) -> list[bytes]:
        answers = received(sockets, message, files)
        if sockets.rank == 1 and files:
            os.close(files[0])
            files[0] = os.open(os.devnull, os.O_RDONLY)  # which cannot be mapped so
        return answers

    monkeypatch.setattr(HostSockets, "exchange", fail_at_one)
    assert run_parties(3, is_shared) == [False] * 3
    assert "party 1: [Errno 1" in caplog.text


def test_memory_that_is_not_free_is_not_reserved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 2_000_001)
    assert run_parties(2, is_shared) == [False] * 2
    assert "party 0: [Errno 12] 2 MB are free" in caplog.text


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_who_dies_while_it_reserves_memory_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that it has forked may hold its sockets open, as this test does."""
    process = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(host_sockets, "_credentials", lambda peer: (process.pid, os.geteuid()))
    mine, held = pair()
    second = HostSockets(1, {0: mine}, timeout_s=20)
    threading.Timer(0.2, process.kill).start()
    began = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match="Connection closed by party 0"):
            shared_memory._allocated(second, 4096)
        assert time.monotonic() - began < 5
    finally:
        process.kill()
        process.wait()
        second.close()
    held.close()


def test_memory_that_comes_too_late_is_a_timeout() -> None:
    mine, other = pair()
    second = HostSockets(1, {0: mine}, timeout_s=0.1)
    with pytest.raises(RuntimeError, match="Timed out"):
        shared_memory._allocated(second, 4096)
    second.close()
    other.close()


@pytest.mark.parametrize(
    "why", ["argument", "other hosts", "another user", "no such system", "no host", "unreachable"]
)
def test_all_use_gloo_if_one_cannot_do_otherwise(
    why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = threading.local()
    host, credentials, supported = host_sockets._host, host_sockets._credentials, host_sockets._supported

    def other_credentials(peer: Any) -> tuple[int, int]:
        process, user = credentials(peer)
        return process, user + (why == "another user" and here.party == 1)

    def own_host() -> list[object]:
        if why == "no host" and here.party == 1:
            raise OSError(errno.ENOENT, "No such file or directory")
        return [*host(), here.party if why == "other hosts" else 0]

    def dial(name: str, rank: int) -> Any:
        if why == "unreachable" and rank == 2:
            raise OSError(errno.ECONNREFUSED, "Connection refused")
        return connect(name, rank)

    connect = host_sockets._dial
    monkeypatch.setattr(host_sockets, "_host", own_host)
    monkeypatch.setattr(host_sockets, "_credentials", other_credentials)
    monkeypatch.setattr(host_sockets, "_dial", dial)
    monkeypatch.setattr(host_sockets, "_CONNECT_S", 1.0)
    monkeypatch.setattr(
        host_sockets, "_supported", lambda: supported() and not (why == "no such system" and here.party == 1)
    )
    store, results = dist.HashStore(), [0.0] * 3

    def party(index: int) -> None:
        here.party = index
        wanted = why != "argument" or index != 1
        federation = Federation(store, index, 3, timeout_s=20, shared_memory=wanted)
        assert not is_shared(federation)
        results[index] = float(federation.all_reduce_(torch.tensor(1.0)))
        federation.close()

    with caplog.at_level(logging.DEBUG, logger="pellm_lightning"):
        in_threads([lambda i=i: party(i) for i in range(3)])
    assert results == [3.0] * 3
    assert "exchanges over Gloo" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_others_of_this_host_do_not_switch_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Abstract names are listed: anybody can connect, and before the parties do."""
    dial = host_sockets._dial
    strangers: list[socket.socket] = []

    def refuse_strangers(peer: socket.socket) -> None:
        accepted = peer.getsockname()  # the name that was dialled, at the other end none
        if accepted and peer.recv(9, socket.MSG_PEEK) == b" 1":
            raise OSError("a process of another user answers")

    def dial_after_strangers(name: str, rank: int) -> socket.socket:
        for message in (b" 1", b"0", b"7", b"-1", b"words", b""):
            strangers.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            strangers[-1].connect(f"\0{name}")
            strangers[-1].send(message) if message else strangers[-1].close()
        return dial(name, rank)

    monkeypatch.setattr(host_sockets, "_check_user", refuse_strangers)
    monkeypatch.setattr(host_sockets, "_dial", dial_after_strangers)

    def act(federation: Federation) -> float:
        assert is_shared(federation)
        return float(federation.all_reduce_(torch.tensor(1.0 + federation.party)))

    assert run_parties(3, act) == [6.0] * 3
    for stranger in strangers:
        stranger.close()


def test_without_watched_processes_the_sockets_have_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every build of Python has pidfd_open."""
    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.setattr(host_sockets, "_credentials", lambda peer: (os.getppid(), os.geteuid()))
    mine, other = pair()
    first = HostSockets(0, {1: mine}, timeout_s=5)
    other.send(b"one")
    assert first.exchange(b"zero") == [b"zero", b"one"]
    first.close()
    other.close()


def test_a_limit_of_the_process_is_no_death(tmp_path: Path) -> None:
    """RLIMIT_FSIZE holds for this memory also; without a reservation the first write would kill."""
    program = """
import resource, sys, torch, torch.distributed as dist
from pellm_lightning import Aggregator, Federation
if sys.argv[1] == "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000_000, 9_000_000))
party = int(sys.argv[1])
federation = Federation(dist.FileStore("store", 2), party, 2, timeout_s=60)
w = torch.zeros(3_000_000)
aggregator = Aggregator(federation, {"w": w})
aggregator.start()
for _ in range(2):
    w += 1 + 2 * party
    aggregator.step(1.0)
print(type(federation._lanes[0]).__name__, w[0].item(), w[-1].item())
federation.close()
"""
    (tmp_path / "program.py").write_text(program)
    # The slots of two parties, 4 MB, are within the limit, 4 rows of 12 MB are not: each round adds 2.
    for done, output in started(tmp_path, "program.py", [["0"], ["1"]]):
        assert done == 0, output
        assert "SharedMemoryLane 4.0 4.0" in output
        assert ("cannot share 48 MB of its memory" in output) == ("[party 0]" in output)


# ---- parties that die


def started(folder: Path, script: str, words: list[list[str]]) -> list[tuple[int, str]]:
    """Return code and output of one process for each list of words."""
    processes = [
        subprocess.Popen(
            [python(), script, *of_process],
            cwd=folder,
            env=process_environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for of_process in words
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


BEFORE = ["before packing", "half packed", "packed", "header half sent", "half combined", "combined"]
# Party 0 has the message of the dead in the last barrier, and may finish the round.
EITHER, AFTER = ["in the barrier"], ["writing"]


@pytest.mark.parametrize("point", [*BEFORE, "with a child", *EITHER, *AFTER])
def test_killed_at(point: str, tmp_path: Path) -> None:
    script = str(SCRIPTS / "shared_memory_party.py")
    ended = started(tmp_path, script, [[str(tmp_path), str(party), point] for party in range(3)])
    assert ended[2][0] != 0
    for party in range(2):
        code, output = ended[party]
        assert code == 0, output
        seen = json.loads((tmp_path / f"{party}.json").read_text())
        rounds = {"writing": [3], "in the barrier": [2, 3] if party == 0 else [2]}.get(point, [2])
        assert seen["round"] in rounds
        assert seen["as_before"], "a failed round must leave the parameters as they were"
        # Each round adds (1 + 2 + 3) / 3 = 2.
        assert seen["global"] == [2.0 * seen["round"] + i for i in range(3)]
        assert "party 2 (its process " in seen["message"], seen["message"]
        assert seen["noticed_s"] < 1, "the others wait for a dead party"
        # No name of it is left that anybody would have to remove.
        assert set(seen["mapped"]) == {"/memfd:pellm (deleted)"}


def test_a_party_that_is_stopped_costs_the_timeout() -> None:
    done = threading.Event()

    def act(federation: Federation) -> None:
        assert is_shared(federation)
        if federation.party == 1:
            done.wait(20)
            return
        try:
            federation.barrier()
        finally:
            done.set()

    late, _ = run_parties(2, act, timeout_s=1, may_fail=True)
    assert isinstance(late, PartyLostError)
    assert "it waited 1 s for party 1 (" in str(late)
    assert late.parties == ("1",)
    assert "raise timeout_s" in str(late)


def test_who_leaves_wakes_who_waits_here_and_there() -> None:
    woken: dict[str, float] = {}
    wakes = threading.Semaphore(0)

    def act(federation: Federation) -> None:
        if federation.party == 0:
            waiting = threading.Thread(target=wait, args=(federation, "own thread"))
            waiting.start()
            time.sleep(0.3)
            woken["left"] = time.monotonic()
            federation.abort("enough")
            waiting.join()
        elif federation.party == 1:
            wait(federation, "party 1")
        else:
            assert all(wakes.acquire(timeout=20) for _ in range(2))  # the others wait for it
            federation.abort("enough")  # to close is to wait for all, 30 s

    def wait(federation: Federation, who: str) -> None:
        with pytest.raises(PartyLostError):
            federation.barrier()
        woken[who] = time.monotonic()
        wakes.release()

    run_parties(3, act, may_fail=True)
    began = woken.pop("left")
    assert woken.keys() == {"own thread", "party 1"}
    assert all(at - began < 1 for at in woken.values())


def test_who_closes_in_another_thread_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {party: pair() for party in (1, 2)}
    first = HostSockets(0, {party: mine for party, (mine, _) in pairs.items()}, timeout_s=20)
    receive, closing = HostSockets._receive, threading.Thread(target=first.close)

    def receive_and_close(sockets: HostSockets, *arguments: Any) -> bytes:
        message = receive(sockets, *arguments)
        closing.start()
        time.sleep(0.2)  # it would close meanwhile what is watched
        return message

    monkeypatch.setattr(HostSockets, "_receive", receive_and_close)
    pairs[1][1].send(b"one")
    with pytest.raises(RuntimeError, match=LEFT):
        first.exchange(b"zero")
    closing.join()
    with pytest.raises(RuntimeError, match=LEFT):
        first.exchange(b"again")
    first.close()
    for _, other in pairs.values():
        other.close()


def test_who_leaves_when_all_have_come_is_no_loss() -> None:
    # Parties 0 and 1 are here, and 1 has gone when party 2 comes, whose message is then late at 0 alone.
    pairs = {(a, b): socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for a, b in [(0, 1), (0, 2)]}
    first = HostSockets(0, {1: pairs[0, 1][0], 2: pairs[0, 2][0]}, timeout_s=20)
    pairs[0, 1][1].send(b"one")
    pairs[0, 1][1].close()
    late = threading.Timer(0.1, lambda: pairs[0, 2][1].send(b"two"))
    late.start()
    assert first.exchange(b"zero") == [b"zero", b"one", b"two"]
    late.join()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="Connection closed by party 1"):
        first.exchange(b"again")
    assert time.monotonic() - began < 1
    first.close()
    pairs[0, 2][1].close()
