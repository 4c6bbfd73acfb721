"""Separate jobs as threads: parties that die, sleep and come back at a chosen point, a rendezvous that goes.

A party that is killed shows no more signs of life and says no farewell; its connections break, as those of a
process do.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from round_history import SIZE, Entry, Findings, findings, noise, recorded
from torch import Tensor

from pellm_lightning import Aggregator
from pellm_lightning.comm import TLS, ElasticFederation, FederationError, Membership, Quorum
from pellm_lightning.comm.polling import polls
from pellm_lightning.comm.rendezvous.frames import Op, pack_body
from pellm_lightning.comm.rendezvous.key_value_store import FullError, KeyValueStore, RefusedError

TTL_S = 0.4


class Killed(BaseException):
    """Nobody catches it: the process is gone."""


class Rendezvous:
    """The real rendezvous' table, in this process: it can go away, and come back empty."""

    def __init__(self, parties: int = 0) -> None:
        self.parties = parties
        self.table = KeyValueStore(parties)
        self.away = False
        self.lock = threading.Lock()

    def restart(self) -> None:
        """Lose everything."""
        with self.lock:
            self.table = KeyValueStore(self.parties)

    def values(self, part: str) -> dict[str, bytes]:
        """Return what is stored under keys with ``part`` in them."""
        with self.lock:
            return {
                key.decode(): value for key, value in self.table._values.items() if part in f"/{key.decode()}"
            }

    def put(self, key: str, value: bytes) -> None:
        """Write what no party would."""
        with self.lock:
            self.table._put(key.encode(), value, b"")


class Client:
    """A party's client of the rendezvous; ``passes`` is called before and after each request."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        name: str,
        passes: Callable[[str, str, str], None],
        twist: Callable[[str, bytes | None], bytes | None] = lambda _, value: value,
    ) -> None:
        self._rendezvous, self._name, self._passes, self._twist = rendezvous, name, passes, twist
        self.asked = 0

    def set(self, key: str, value: str) -> None:
        self._ask(Op.SET, key, value)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        found = self._ask(Op.COMPARE_SET, key, expected, desired)[0]
        return self._twist(key, found) or b""

    def try_multi_get(self, keys: Sequence[str]) -> list[bytes | None]:
        found = self._ask(Op.MULTI_GET, *keys)
        return [self._twist(key, value) for key, value in zip(keys, found, strict=True)]

    def delete_key(self, key: str) -> bool:
        return self._ask(Op.DELETE, key) == [b"1"]

    def _ask(self, op: Op, *words: str) -> list[bytes | None]:
        self._passes("before", op.name.lower(), words[0])
        answer = self._answer(op, [word.encode() for word in words])
        self._passes("after", op.name.lower(), words[0])
        return answer

    def _answer(self, op: Op, fields: Sequence[bytes | None]) -> list[bytes | None]:
        if self._rendezvous.away:
            raise dist.DistNetworkError("the rendezvous is away")
        try:
            with self._rendezvous.lock:
                answer = self._rendezvous.table.answer(op, fields, self._name)
        except FullError as error:
            raise dist.DistStoreError(str(error)) from error
        except RefusedError as error:
            raise FederationError(f"refused: {error}") from error
        self.asked += 1
        return answer


class TransactingClient(Client):
    """One that has transactions, as that of the real rendezvous; each of their requests passes the points."""

    def transact(self, requests: Sequence[tuple[Op, Sequence[bytes]]]) -> list[list[bytes | None]]:
        for op, fields in requests:
            self._passes("before", op.name.lower(), fields[0].decode())
        packed = [pack_body(op, fields) for op, fields in requests]
        fields_left, answers = self._answer(Op.TRANSACT, packed), []
        while fields_left:
            count = 1 + int(fields_left[0] or b"")
            answers.append(fields_left[1:count])
            fields_left = fields_left[count:]
        for op, fields in requests[: len(answers)]:
            self._passes("after", op.name.lower(), fields[0].decode())
        return [
            [self._twist(key.decode(), value) for key, value in zip(fields, answer, strict=False)]
            for (_, fields), answer in zip(requests, answers, strict=False)
        ]

    def await_change(self, known: Mapping[str, bytes | None], seconds: float) -> list[bytes | None]:
        for _ in polls(seconds):
            fields = [b"0", *(field for key, value in known.items() for field in (key.encode(), value))]
            values = self._answer(Op.AWAIT, fields)
            if values != [*known.values()]:
                break
        return [self._twist(key, value) for key, value in zip(known, values, strict=True)]


Act = Callable[["Life"], None]


class Life:
    """One process of a party, as a thread.

    Args:
        world: What all parties have in common.
        name: The party.
        faults: What happens at which point, by its name; "vote:before@3": before its vote on version 3.
        weight: How much the party counts.
        pace_s: How long its local steps take.
        finishes: Whether it drains and closes after the last round.
        rounds: How many rounds it trains, if not as many as all.
        twist: Changes what it reads from the rendezvous, given key and value.
    """

    def __init__(
        self,
        world: "World",
        name: str,
        *,
        faults: Mapping[str, Act] | None = None,
        weight: float | None = None,
        pace_s: float = 0.0,
        finishes: bool = True,
        rounds: int | None = None,
        twist: Callable[[str, bytes | None], bytes | None] = lambda _, value: value,
        **arguments: Any,
    ) -> None:
        self.world, self.name, self.index = world, name, world.roster.index(name)
        self.faults = dict(faults or {})
        self.passed: list[str] = []
        self.weight = self.index + 1.0 if weight is None else weight
        self.pace_s, self.finishes = pace_s, finishes
        self.rounds, self.twist = rounds, twist
        self.arguments = arguments
        self.error: BaseException | None = None
        self.dead = False
        self.reports: list[Any] = []
        self.federation: ElasticFederation | None = None
        self.aggregator: Aggregator | None = None
        self._awake = threading.Event()
        self._awake.set()
        self._clients = 0
        self.thread = threading.Thread(target=self._run, name=f"job {name}")
        self.thread.start()

    # ---- what a test asks and does

    def join(self, timeout_s: float = 30.0) -> "Life":
        self.thread.join(timeout_s)
        assert not self.thread.is_alive(), f"party {self.name} hangs after {self.passed[-5:]}"
        return self

    @property
    def parameters(self) -> Tensor:
        return self.w

    def stop(self) -> None:
        """Kill it from outside, at the next point that it passes."""
        self.faults["any"] = die
        if self.federation is not None:
            self.federation.interrupt = lambda: die(self)

    # ---- points

    def reach(self, point: str) -> None:
        """Pass a point; whatever shall happen there happens once."""
        if self.dead:
            raise Killed
        round = self.aggregator.round if self.aggregator is not None else 0
        self.passed.append(f"{point}@{round}")
        for name in (f"{point}@{round}", point, "any"):
            act = self.faults.pop(name, None)
            if act is not None:
                act(self)

    def _passes(self, when: str, op: str, key: str) -> None:
        if op in ("set", "compare_set") and "/" in key:
            self.reach(f"{key.split('/')[1]}:{when}")

    # ---- the process

    def _connect(self) -> Any:
        self._clients += 1
        client = TransactingClient if self.world.transacts else Client
        if self._clients == 1:
            return client(self.world.rendezvous, self.name, self._passes, self.twist)

        def beats(*_: str) -> None:
            self._awake.wait()  # its heart stands still while it sleeps

        return client(self.world.rendezvous, self.name, beats, self.twist)

    def _run(self) -> None:
        try:
            self._live()
        except Killed:
            self.dead = True
        except BaseException as error:
            if not self.dead:
                self.error = error
        federation = self.federation
        if federation is None:
            return
        if self.dead:
            self._awake.set()
            _stop_heart(federation)
            federation._connections.drop()
            federation._listener.close()
        elif self.error is not None:
            federation.abort(f"{type(self.error).__name__}")

    def _live(self) -> None:
        world = self.world
        membership, arguments = dict(world.membership), dict(self.arguments)
        membership |= arguments.pop("membership", {})
        resumed = arguments.pop("resume", None)
        federation = self.federation = ElasticFederation(
            self._connect,  # type: ignore[arg-type]
            self.name,
            world.roster,
            quorum=world.quorum,
            membership=Membership(**membership),
            advertise=arguments.pop("advertise", None),
            tls=world.tls and world.tls(self.name),
        )
        generator = torch.Generator().manual_seed(77 + self.index)
        self.w = torch.randn(arguments.pop("size", SIZE), generator=generator)
        self.make = arguments.pop("train", None)
        state_dir = arguments.pop("state_dir", world.state_dir and world.state_dir / self.name)
        aggregator = Aggregator(
            federation,
            arguments.pop("parameters", {"w": self.w}),
            quorum=world.quorum,
            state_dir=state_dir,
            **arguments,
        )
        self.aggregator = aggregator
        if resumed is not None:
            aggregator.load_state_dict(resumed)
        recorded(aggregator, self._keep)
        self._instrument(federation, aggregator)
        aggregator.start()
        self.reach("started")
        while aggregator.round < (self.rounds or world.rounds):
            self._train(aggregator)
            self.reports.append(aggregator.step(self.weight, loss=1.0 + self.index))
            self._check_written(aggregator)
        if self.finishes:
            for report in aggregator.drain():
                self.reports.append(report)
                self._check_written(aggregator)
            federation.close()

    def _train(self, aggregator: Aggregator) -> None:
        self.reach("training")
        if self.make is not None:
            self.make(self)
        else:
            self.w.copy_(aggregator.global_vector + noise(self.index, aggregator.round, self.w.numel()))
        time.sleep(self.pace_s)

    def _check_written(self, aggregator: Aggregator) -> None:
        if "parameters" not in self.arguments:
            assert torch.equal(self.w, aggregator.global_vector), "the parameters are not the global vector"

    def _keep(self, entry: Entry) -> None:
        self.world.keep(entry)
        if entry.stage != "made":
            self.reach("settled")

    def _instrument(self, federation: Any, aggregator: Any) -> None:
        """Make it pass points that are no request to the rendezvous."""
        self._before(federation, "_connected_to", "forming")
        self._before(federation, "commit", "voting")
        self._before(federation, "all_reduce_each_", "exchanging")
        self._before(aggregator._rounds, "_bring_up_to_date", "transfer")
        self._before(aggregator._global_state, "write_", "writing")
        if aggregator._coordinator._state_dir is not None:
            self._before(aggregator._coordinator._state_dir, "keep", "keeping")
        all_to_all = federation.all_to_all

        def hands(parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
            if any(part.numel() for part in parts):
                self.reach("handing")
            if any(sizes):
                self.reach("receiving")
            return all_to_all(parts, sizes)

        federation.all_to_all = hands

    def _before(self, owner: Any, method: str, point: str) -> None:
        act = getattr(owner, method)

        def acts(*arguments: Any, **keywords: Any) -> Any:
            self.reach(point)
            return act(*arguments, **keywords)

        setattr(owner, method, acts)


class World:
    """What all parties have in common: a roster, a rendezvous, and the record of what came of each round."""

    def __init__(
        self,
        parties: int,
        *,
        rounds: int = 4,
        state_dir: Path | None = None,
        quorum: Quorum = "majority",
        tls: Callable[[str], TLS] | None = None,
        transacts: bool = True,
        **membership: Any,
    ) -> None:
        self.tls, self.transacts = tls, transacts
        self.roster = [f"p{i}" for i in range(parties)]
        self.rounds = rounds
        self.state_dir = state_dir
        self.quorum: Quorum = quorum
        self.membership = {"heartbeat_ttl_s": TTL_S, "wait_s": 8.0, "exchange_timeout_s": 5.0} | membership
        self.rendezvous = Rendezvous(parties)
        self.entries: list[Entry] = []
        self.lives: list[Life] = []
        self._lock = threading.Lock()

    def start(self, *names: str, **arguments: Any) -> list[Life]:
        """Start parties, all if none is named."""
        started = [Life(self, name, **arguments) for name in names or self.roster]
        self.lives += started
        return started

    def keep(self, entry: Entry) -> None:
        with self._lock:
            self.entries.append(entry)

    def wait_for(self, round: int, timeout_s: float = 20.0) -> None:
        """Wait until somebody has settled a round."""
        self.until(lambda: self.reached >= round, timeout_s)

    def until(self, holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, [(e.party, e.round, e.attempt) for e in self.entries]
            time.sleep(0.01)

    def counts(self, name: str, since: int = 0) -> bool:
        """Tell whether a party has counted in a round after ``since``."""
        return any(
            name in entry.members and entry.weights[entry.members.index(name)] > 0
            for entry in self.settled
            if entry.round > since and entry.weights
        )

    @property
    def reached(self) -> int:
        """The last round that somebody has settled."""
        return max((entry.round for entry in self.settled), default=0)

    @property
    def settled(self) -> list[Entry]:
        """What the parties took for settled."""
        return [entry for entry in list(self.entries) if entry.stage != "made"]

    def finish(self, rounds: int = 2) -> None:
        """Let the federation end a few rounds from now, when all that live take part, and wait for them."""
        alive = {life.name for life in self.lives if life.thread.is_alive()}
        before = self.reached
        self.until(
            lambda: any(
                alive <= set(e.members) and e.weights and e.round > before for e in reversed(self.settled)
            )
        )
        self.rounds = self.reached + rounds
        self.join()

    def join(self, timeout_s: float = 30.0) -> None:
        """Wait for all; raise what a party has raised."""
        for life in self.lives:
            life.join(timeout_s)
        failed = [life.error for life in self.lives if life.error is not None]
        if failed:
            raise failed[0]

    def kill(self) -> None:
        """Kill all that run, and wait until none does."""
        for life in self.lives:
            life.stop()
        for life in self.lives:
            life.join()

    def close(self) -> None:
        """End what a failed test has left running."""
        for life in self.lives:
            life.stop()
            life._awake.set()
            life.thread.join(10)

    def judged(self) -> Findings:
        """Return what is wrong with what the parties have recorded; nothing must be."""
        found = findings(self.entries, self.roster)
        assert found.is_sound, (found, [_short(e) for e in self.entries])
        return found


# ---- what may happen at a point


def die(life: Life) -> None:
    """Kill the process: no sign of life from now on, no farewell."""
    life.dead = True
    if life.federation is not None:
        _stop_heart(life.federation)
    raise Killed


def sleeps(seconds: float) -> Act:
    """Stop the process for a while, as SIGSTOP does."""

    def sleep(life: Life) -> None:
        life._awake.clear()
        time.sleep(seconds)
        life._awake.set()

    return sleep


def dawdles(seconds: float) -> Act:
    """Let the main thread be slow; the heart beats on."""
    return lambda life: time.sleep(seconds)


def loses_rendezvous(life: Life) -> None:
    """Restart the rendezvous."""
    life.world.rendezvous.restart()


def without_rendezvous(seconds: float) -> Act:
    """Let the rendezvous go away, and come back empty after a while."""

    def act(life: Life) -> None:
        rendezvous = life.world.rendezvous
        rendezvous.away = True

        def back() -> None:
            rendezvous.restart()
            rendezvous.away = False

        timer = threading.Timer(seconds, back)
        timer.start()

    return act


def _short(entry: Entry) -> str:
    mark = {"made": "~", "in doubt": "?", "settled": ""}[entry.stage]
    return f"{entry.party}:{entry.round}/{entry.attempt}{mark} {entry.digest[:4]} {entry.weights}"


def _stop_heart(federation: Any) -> None:
    heart = federation._peers
    heart._stopping = True
    heart._wake.set()
    heart._thread.join()
