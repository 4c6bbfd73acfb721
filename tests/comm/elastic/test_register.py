"""Registers over each kind of store: transactions, lives of the store, fencing, and waits for a change."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from job_threads import Client, Rendezvous, TransactingClient

from pellm_lightning.comm import FederationError
from pellm_lightning.comm.elastic.register import (
    Delete,
    Fence,
    Register,
    ReplacedError,
    RestartedError,
    Swap,
    Write,
)

Connect = Callable[[], Register]


def nothing(*_: str) -> None:
    pass


@pytest.fixture(params=["one trip", "one by one", "torch's own"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Makes registers of one store, all for party a."""
    rendezvous, store = Rendezvous(), dist.HashStore()
    clients: dict[str, Callable[[], Any]] = {
        "one trip": lambda: TransactingClient(rendezvous, "a", nothing),
        "one by one": lambda: Client(rendezvous, "a", nothing),
        "torch's own": lambda: store,
    }

    def make() -> Register:
        register = Register(clients[request.param]())
        register.renew()
        return register

    return make


def test_what_is_written_is_read_in_the_same_transaction(connect: Connect) -> None:
    register = connect()
    swapped, read = register.transact(
        [Write("vote/@a", {"digest": "x"}), Swap("term", None, 1), Swap("term", 1, 2), Swap("term", 1, 3)],
        ["term", "vote/@a", "none"],
    )
    assert swapped == [1, 2, 2]
    assert read == [2, {"digest": "x"}, None]
    assert connect().transact([Delete("term"), Delete("none")], ["term"]) == ([], [None])
    assert register.claim("view/1", {"group": "g"}) == connect().claim("view/1", {"group": "h"})


def test_in_another_life_nothing_is_written(connect: Connect) -> None:
    register, other = connect(), connect()
    other._store.delete_key("life")
    other.life = ""
    other.renew()
    for act in (lambda: register.write("vote/@a", 1), lambda: register.read("term")):
        with pytest.raises(RestartedError):
            act()
    with pytest.raises(RestartedError):
        register.wait(0.1, "term")
    old, new = register.life, other.life
    assert old != new
    assert register.renew()
    assert register.life == new
    assert register.read("vote/@a") == [None]


def test_a_process_that_was_replaced_writes_nothing(connect: Connect) -> None:
    first, second = connect(), connect()
    first.claim("owner/@a", "1")
    first.fence(Fence("a", "1"))
    first.write("vote/@a", "of the first")
    second.swap("owner/@a", "1", "2")
    second.fence(Fence("a", "2"))
    second.write("vote/@a", "of the second")
    for act in (
        lambda: first.write("vote/@a", "late"),
        lambda: first.claim("decision/1", "late"),
        lambda: first.delete("vote/@a"),
        lambda: first.transact([Write("member/@a", "late")], ["term"]),
    ):
        with pytest.raises(ReplacedError, match="Another process has taken the place of party a"):
            act()
    assert first.read("vote/@a", "decision/1", "member/@a") == ["of the second", None, None], "it may read"
    assert issubclass(ReplacedError, FederationError)


def test_of_two_processes_one_owns_the_name_in_a_new_life(connect: Connect) -> None:
    first, second = connect(), connect()
    first.claim("owner/@a", "1")
    first.fence(Fence("a", "1"))
    second.fence(Fence("a", "2"))
    first._store.delete_key("life")
    assert first.renew()
    first.write("vote/@a", 1)
    with pytest.raises(ReplacedError):
        second.renew()


def test_a_mark_that_is_gone_is_claimed_anew(connect: Connect) -> None:
    register = connect()
    register.claim("owner/@a", "1")
    register.fence(Fence("a", "1"))
    connect().delete("owner/@a")
    with pytest.raises(RestartedError):
        register.write("vote/@a", 1)
    assert not register.renew(), "the store's life is the same"
    register.write("vote/@a", 1)


def test_a_wait_ends_with_a_change_of_what_was_read_last(connect: Connect) -> None:
    register, other = connect(), connect()
    began = time.monotonic()
    assert register.read("term", "view/1") == [None, None]
    assert register.wait(0.05, "term", "view/1") == [None, None]
    assert time.monotonic() - began > 0.04
    threading.Timer(0.1, lambda: other.claim("view/1", {"group": "g"})).start()
    assert register.wait(5, "term", "view/1") == [None, {"group": "g"}]
    assert time.monotonic() - began < 3
    began = time.monotonic()
    assert register.wait(0.05, "view/1") == [{"group": "g"}], "what it has returned is known"
    assert time.monotonic() - began > 0.04
    assert register.claim("decision/1", "d") == "d"
    assert register.wait(0.05, "decision/1") == ["d"], "and so is what was swapped"
    other.swap("decision/1", "d", "e")
    assert register.wait(5, "decision/1") == ["e"]


def test_values_of_any_size_are_waited_for(connect: Connect) -> None:
    """The rendezvous keeps small requests only, and each peer decides how large its value is."""
    register, other = connect(), connect()
    large = "x" * 100_000
    register.write("heard/@a", large)
    assert register.read("heard/@a") == [large]
    assert register.wait(0.05, "heard/@a") == [large]
    threading.Timer(0.05, lambda: other.write("heard/@a", "")).start()
    assert register.wait(5, "heard/@a") == [""]


@pytest.mark.parametrize("levels", [64, 65, 600, 100_000])
def test_what_is_nested_too_deeply_to_be_copied_is_nothing(connect: Connect, levels: int) -> None:
    register, value = connect(), "x"
    text = "[" * levels + json.dumps(value) + "]" * levels
    register._store.set(register._key("vote/@a"), text)
    assert register.read("vote/@a") == [json.loads(text) if levels <= 64 else None]
