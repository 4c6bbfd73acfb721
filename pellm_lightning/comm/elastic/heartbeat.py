"""Failure detector: each party sends heartbeats, and watches those of the others."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pellm_lightning.comm.elastic.membership import LocalParty
from pellm_lightning.comm.elastic.quorum_view import QuorumMember, QuorumView
from pellm_lightning.comm.elastic.register import (
    Delete,
    Fence,
    Register,
    ReplacedError,
    RestartedError,
    UnreachableError,
    Write,
)
from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.polling import polls

log = logging.getLogger(__name__)


@dataclass
class _Beat:
    """The last heartbeat of a party, and when it was new, on this party's own clock."""

    status: dict[str, Any] = field(default_factory=dict)
    changed: float = 0.0


class Heartbeat:
    """Thread that sends this party's heartbeat, and tells which processes of the others are alive.

    No two machines' clocks are compared: a party is alive if its heartbeat has changed within
    ``membership.heartbeat_ttl_s`` of the watcher's own monotonic clock. Each process behind a name is another
    incarnation of its party.

    A heartbeat is one trip to the rendezvous: it is written, and those of the others are read. It also reads
    what the main thread has no time to look at during an exchange (``watch``).

    Args:
        register: A register over a client of its own.
        me: This party.
        phase: What it does, which its heartbeat says.

    Example::

        peers = Heartbeat(register, me, "joining")
        lost = peers.dead(view)
    """

    def __init__(self, register: Register, me: LocalParty, phase: str) -> None:
        self._register = register
        self._name, self._incarnation = me.name, me.incarnation
        self._fence = Fence(me.name, me.incarnation)
        self._others = [other for other in me.roster if other != me.name]
        self._status: dict[str, Any] = {"incarnation": me.incarnation, "member": False, "phase": phase}
        self._ttl_s = me.membership.heartbeat_ttl_s
        self._beats = 0
        self._last: dict[str, _Beat] = {}
        self._incarnations: set[str] = set()
        self._watched: tuple[str, str] = ("", "")
        self._found: Any = None
        self._was_read = False
        self._lock = threading.Lock()
        self._stopping = False
        self._wake = threading.Event()
        self.is_replaced = False
        """Whether another process has taken this one's place; then it writes nothing any more."""
        self._join(me.membership.wait_s)
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{me.name}", daemon=True)
        self._thread.start()

    def set_status(self, **status: Any) -> None:
        """Change what this party's heartbeat says, from the next one on."""
        with self._lock:
            self._status = self._status | status

    def publish_status(self, **status: Any) -> None:
        """Change what this party's heartbeat says, and send it now."""
        with self._lock:
            changes = not status.items() <= self._status.items()
        if changes:
            self.set_status(**status)
            self._wake.set()

    # ---- this process

    def check_not_replaced(self) -> None:
        """Raise if another process has taken this one's place; there must never be two.

        Raises:
            ReplacedError: If one has.
        """
        if self.is_replaced:
            self._fence.check(None)

    def _is_foreign(self, beat: Any) -> bool:
        """Tell whether a heartbeat under this party's name is that of another process."""
        return isinstance(beat, dict) and beat.get("incarnation", self._incarnation) != self._incarnation

    # ---- the others

    def watch(self, key: str, life: str) -> None:
        """Read this key with every heartbeat from now on, in this life of the store."""
        with self._lock:
            self._watched, self._found, self._was_read = (key, life), None, False
        if life != self._register.life:  # one of the two has not noticed a restart yet
            self._wake.set()

    def watched(self) -> Any:
        """Return what the last heartbeat has read under the watched key, None for nothing.

        Raises:
            RestartedError: If the store has begun another life since.
        """
        with self._lock:
            # Before it was read, it may be the heartbeat that has not noticed a restart yet.
            if self._was_read and self._watched[1] != self._register.life:
                raise RestartedError
            return self._found

    def note_incarnations(self, entries: Mapping[str, QuorumMember]) -> None:
        """Note processes that are known otherwise, before their first heartbeat was seen."""
        with self._lock:
            for name, entry in entries.items():
                if name == self._name or entry.incarnation in self._incarnations:
                    continue
                self._incarnations.add(entry.incarnation)
                beat = self._last.get(name)
                if beat is None or beat.status.get("incarnation") != entry.incarnation:
                    self._last[name] = _Beat({"incarnation": entry.incarnation}, time.monotonic())

    def alive(self, name: str) -> bool:
        """Tell whether any process of a party is alive."""
        silence = 0.0 if name == self._name else self._seen(name)[1]
        return silence is not None and silence <= self._ttl_s

    def incarnation(self, name: str) -> str:
        """Return which process of a party was seen last."""
        return str(self._seen(name)[0].get("incarnation"))

    def runs(self, name: str, incarnation: str) -> bool:
        """Tell whether a process of a party is still alive."""
        if name == self._name:
            return incarnation == self._incarnation
        return self.alive(name) and self.incarnation(name) == incarnation

    def is_member(self, name: str) -> bool:
        """Tell whether a party is alive that has been part of a quorum."""
        return self.alive(name) and bool(self._seen(name)[0].get("member"))

    def dead(self, view: QuorumView) -> list[str]:
        """Return which members of a view have died since."""
        return [name for name, entry in view.entries.items() if not self.runs(name, entry.incarnation)]

    def said(self, key: str) -> list[Any]:
        """Return what the heartbeats of the others that are alive say under a key."""
        return [self._seen(name)[0].get(key) for name in self._others if self.alive(name)]

    def phase(self, name: str) -> str:
        """Return what a party does, for display."""
        status, silence = self._seen(name)
        if "left" in status:
            return "left"
        if silence is None:
            return "not seen yet"
        return str(status.get("phase", "busy")) if self.alive(name) else f"silent for {silence:.0f} s"

    def fate(self, name: str) -> str:
        """Return what is known about a party that has not joined."""
        status, silence = self._seen(name)
        if "left" in status:
            return f"it left while {status['left']}"
        if silence is None:
            return "it was never seen"
        if self.alive(name):
            return f"it did not join (it was last seen {status.get('phase', 'busy')})"
        return f"it has sent no heartbeat for {silence:.1f} s ({status.get('phase', 'busy')})"

    def _seen(self, name: str) -> tuple[dict[str, Any], float | None]:
        """Return what a party's last heartbeat said, and the seconds since; None if there was none."""
        with self._lock:
            beat = self._last.get(name)
            return (beat.status, time.monotonic() - beat.changed) if beat else ({}, None)

    # ---- the thread

    def stop(self, *, reason: str | None) -> None:
        """Send no more heartbeats.

        Args:
            reason: Why this party leaves, for the others; None removes the heartbeat.
        """
        self._stopping = True
        self._wake.set()
        self._thread.join()
        if self.is_replaced:
            return
        key = heartbeat_key(self._name)
        try:
            self._register.transact([Delete(key) if reason is None else Write(key, {"left": reason})])
        except (UnreachableError, RestartedError, FederationError):  # one that is refused, or replaced
            log.debug("[party %s] left, but the rendezvous cannot be informed", self._name)

    def _join(self, wait_s: float) -> None:
        """Take the name, and send the first heartbeat, so that the first poll knows who is alive."""
        away = UnreachableError("no attempt was made")
        for _ in polls(wait_s):
            try:
                self._take_name()
                self._register.fence(self._fence)
                self._round_trip()
                return
            except RestartedError:
                with contextlib.suppress(UnreachableError):
                    self._register.renew()
            except UnreachableError as error:
                away = error
        raise away

    def _take_name(self) -> None:
        """Claim the name, or raise if another process under it is alive: its heartbeat changes meanwhile.

        Of two that start at once one must be refused before it has written anything else: each would
        overwrite the other's values.
        """
        key, mine = heartbeat_key(self._name), self._status | {"beat": 0}
        before, owner = self._register.read(key, self._fence.key)
        now, deadline = before, time.monotonic() + self._ttl_s / 2
        while self._is_foreign(now) and now == before and (left_s := deadline - time.monotonic()) > 0:
            (now,) = self._register.wait(left_s, key)
        now = self._register.swap(key, before, mine)
        if self._is_foreign(now) or (
            self._register.swap(self._fence.key, owner, self._incarnation) != self._incarnation
        ):
            raise FederationError(
                f"A process that runs as party {self._name} is there already. Give every party a name of"
                " its own, and start each once. One that hangs must be ended first."
            )

    def _run(self) -> None:
        watched, alive = time.monotonic(), self._alive()
        while True:
            self._wake.wait(self._ttl_s / 6)
            self._wake.clear()
            if self._stopping or self.is_replaced:
                return
            # A party that was suspended, or had no rendezvous, has not watched: nobody else died of that.
            missed = time.monotonic() - watched > self._ttl_s / 2
            try:
                missed |= not self._beat()
            except ReplacedError:
                self.is_replaced = True
                return
            except FederationError as error:  # refused for good, as the main thread will also be
                log.warning("[party %s] sends no more heartbeats: %s", self._name, error)
                return
            if missed:
                self._reset(alive)
            watched, alive = time.monotonic(), self._alive()

    def _beat(self) -> bool:
        """Send a heartbeat, also to a rendezvous that was restarted; return whether that worked."""
        for _ in range(2):
            try:
                self._round_trip()
                return True
            except RestartedError:
                with contextlib.suppress(UnreachableError):
                    if self._register.renew():
                        log.info("[party %s] the rendezvous was restarted", self._name)
            except UnreachableError:
                break
        return False

    def _round_trip(self) -> None:
        """Send a heartbeat and read those of the others."""
        self._beats += 1
        with self._lock:
            mine, (watched, life) = self._status | {"beat": self._beats}, self._watched
        keys = [*map(heartbeat_key, self._others), *([watched] if watched else [])]
        _, values = self._register.transact([Write(heartbeat_key(self._name), mine)], keys)
        now = time.monotonic()
        with self._lock:
            if watched and (watched, life) == self._watched:
                self._found, self._was_read = values[-1], True
            for party, status in zip(self._others, values, strict=False):
                self._observe(party, status, now)

    def _observe(self, party: str, status: Any, now: float) -> None:
        if not isinstance(status, dict):
            return  # a restarted store does not know it yet
        beat = self._last.setdefault(party, _Beat())
        self._incarnations.add(str(status.get("incarnation")))
        if "left" in status:
            beat.changed = -math.inf  # at once
        elif beat.status != status:
            beat.changed = now
        beat.status = status

    def _alive(self) -> list[str]:
        return [other for other in self._others if self.alive(other)]

    def _reset(self, parties: Sequence[str]) -> None:
        with self._lock:
            for beat in (self._last[party] for party in parties):
                if "left" not in beat.status:
                    beat.changed = time.monotonic()


def heartbeat_key(name: str) -> str:
    """Return the key of a party's heartbeat."""
    return f"at/@{name}"
