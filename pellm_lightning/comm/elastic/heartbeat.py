"""Heartbeats: each party sends its own and watches those of the others."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pellm_lightning.comm.elastic.register import Register, RestartedError, UnreachableError
from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.polling import polls

log = logging.getLogger(__name__)


@dataclass
class _Beat:
    """The last heartbeat of a party, and when it was new, on this party's own clock."""

    status: dict[str, Any] = field(default_factory=dict)
    changed: float = 0.0


class Heartbeat:
    """Thread that sends this party's heartbeat and watches for changes of the others'.

    No two machines' clocks are compared: a party is alive if its heartbeat has changed within ``ttl_s`` of
    the watcher's own monotonic clock.

    Args:
        register: A register over a client of its own.
        name: This party.
        roster: All parties.
        status: What else this party's heartbeat says.
        ttl_s: Seconds without a change after which a party counts as dead.

    Example::

        heartbeat = Heartbeat(register, "a", ["a", "b"], {"incarnation": "x"}, ttl_s=5)
        heartbeat.alive("b")
    """

    def __init__(
        self, register: Register, name: str, roster: Sequence[str], status: dict[str, Any], ttl_s: float
    ) -> None:
        self._register = register
        self._name = name
        self._others = [other for other in roster if other != name]
        self._status = status
        self._incarnation = status["incarnation"]
        self._ttl_s = ttl_s
        self._beats = 0
        self._last: dict[str, _Beat] = {}
        self._incarnations: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._wake = threading.Event()
        self.is_replaced = False
        """Whether another process has taken this one's place; then it writes nothing any more."""
        with contextlib.suppress(UnreachableError, RestartedError):  # the thread tries again
            self._take_name()
            self._round_trip()  # so that the first poll knows who is alive
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{name}", daemon=True)
        self._thread.start()

    def set_status(self, **status: Any) -> None:
        """Change what this party's heartbeat says, from the next one on."""
        with self._lock:
            self._status = self._status | status

    def is_foreign(self, beat: Any) -> bool:
        """Tell whether a heartbeat under this party's name is that of another process."""
        return isinstance(beat, dict) and beat.get("incarnation", self._incarnation) != self._incarnation

    def publish_status(self, **status: Any) -> None:
        """Change what this party's heartbeat says, and send it now."""
        with self._lock:
            changes = not status.items() <= self._status.items()
        if changes:
            self.set_status(**status)
            self._wake.set()

    def note_incarnation(self, party: str, incarnation: str) -> None:
        """Note a process that is known otherwise, before its first heartbeat was seen."""
        with self._lock:
            if party == self._name or incarnation in self._incarnations:
                return
            self._incarnations.add(incarnation)
            beat = self._last.get(party)
            if beat is None or beat.status.get("incarnation") != incarnation:
                self._last[party] = _Beat({"incarnation": incarnation}, time.monotonic())

    def alive(self, party: str) -> bool:
        """Tell whether a party's heartbeat has changed within the TTL."""
        if party == self._name:
            return True
        with self._lock:
            beat = self._last.get(party)
            return beat is not None and time.monotonic() - beat.changed <= self._ttl_s

    def status_of(self, party: str) -> dict[str, Any]:
        """Return what a party's last heartbeat said, empty if there was none."""
        with self._lock:
            beat = self._last.get(party)
            return dict(beat.status) if beat else {}

    def silence_s(self, party: str) -> float | None:
        """Return the seconds since a party's last heartbeat, None if it was never seen."""
        with self._lock:
            beat = self._last.get(party)
            return None if beat is None else time.monotonic() - beat.changed

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
        try:
            if reason is None:
                self._register.delete(heartbeat_key(self._name))
            else:
                self._register.write(heartbeat_key(self._name), {"left": reason})
        except UnreachableError:
            log.debug("[party %s] left, but the rendezvous cannot be told", self._name)

    def _take_name(self) -> None:
        """Claim the name, or raise if another process under it is alive: its heartbeat changes meanwhile.

        Of two that start at once one must be refused before it has written anything else: each would
        overwrite the other's values.
        """
        key, mine = heartbeat_key(self._name), self._status | {"beat": 0}
        before = self._register.claim(key, mine)
        if before == mine:
            return
        for _ in polls(self._ttl_s / 2 if self.is_foreign(before) else 0.0):
            (now,) = self._register.read(key)
            if now != before:
                break
        now = self._register.swap(key, before, mine)
        if now != before and self.is_foreign(now):
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
                self._round_trip()
            except (UnreachableError, RestartedError):
                missed = True
            if missed:
                self._reset(alive)
            watched, alive = time.monotonic(), self._alive()

    def _round_trip(self) -> None:
        """Send a heartbeat and read those of the others."""
        if self._register.renew():
            log.info("[party %s] the rendezvous was restarted", self._name)
        own, *others = self._register.read(*map(heartbeat_key, [self._name, *self._others]))
        if self._beats and self.is_foreign(own):
            self.is_replaced = True
            return
        self._beats += 1
        with self._lock:
            mine = self._status | {"beat": self._beats}
        self._register.write(heartbeat_key(self._name), mine)
        now = time.monotonic()
        with self._lock:
            for party, status in zip(self._others, others, strict=True):
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
