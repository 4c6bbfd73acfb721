"""Signs of life: each party shows its own and watches those of the others."""

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
class _Sign:
    """The last sign of life of a party, and when it was new, on this party's own clock."""

    words: dict[str, Any] = field(default_factory=dict)
    changed: float = 0.0


class Heartbeat:
    """A thread that counts up this party's sign of life and sees whose has changed.

    No two machines' clocks are compared: a party is alive if its sign has changed within ``ttl_s`` of the
    watcher's own monotonic clock.

    Args:
        register: A register over a client of its own.
        name: This party.
        roster: All parties.
        words: What else this party's sign says.
        ttl_s: Seconds without a change after which a party counts as dead.
    """

    def __init__(
        self, register: Register, name: str, roster: Sequence[str], words: dict[str, Any], ttl_s: float
    ) -> None:
        self._register = register
        self._name = name
        self._others = [other for other in roster if other != name]
        self._words = words
        self._incarnation = words["incarnation"]
        self._ttl_s = ttl_s
        self._beats = 0
        self._signs: dict[str, _Sign] = {}
        self._heard: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._wake = threading.Event()
        self.is_replaced = False
        """Whether another process has taken this one's place; then it writes nothing any more."""
        with contextlib.suppress(UnreachableError, RestartedError):  # the thread goes on trying
            self._take_name()
            self._round_trip()  # so that the first look knows who is there
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{name}", daemon=True)
        self._thread.start()

    def say(self, **words: Any) -> None:
        """Change what this party's sign says, from the next beat on."""
        with self._lock:
            self._words = self._words | words

    def is_foreign(self, sign: Any) -> bool:
        """Tell whether a sign under this party's name is that of another process."""
        return isinstance(sign, dict) and sign.get("incarnation", self._incarnation) != self._incarnation

    def say_now(self, **words: Any) -> None:
        """Change what this party's sign says, and show it."""
        with self._lock:
            news = not words.items() <= self._words.items()
        if news:
            self.say(**words)
            self._wake.set()

    def hear(self, party: str, incarnation: str) -> None:
        """Take note of a process that was heard of otherwise, before its first sign was seen."""
        with self._lock:
            if party == self._name or incarnation in self._heard:
                return
            self._heard.add(incarnation)
            sign = self._signs.get(party)
            if sign is None or sign.words.get("incarnation") != incarnation:
                self._signs[party] = _Sign({"incarnation": incarnation}, time.monotonic())

    def alive(self, party: str) -> bool:
        """Tell whether a party shows signs of life."""
        if party == self._name:
            return True
        with self._lock:
            sign = self._signs.get(party)
            return sign is not None and time.monotonic() - sign.changed <= self._ttl_s

    def seen(self, party: str) -> dict[str, Any]:
        """Return what a party's last sign said, empty if it has shown none."""
        with self._lock:
            sign = self._signs.get(party)
            return dict(sign.words) if sign else {}

    def silence(self, party: str) -> float | None:
        """Return for how many seconds a party has been silent, None if it was never seen."""
        with self._lock:
            sign = self._signs.get(party)
            return None if sign is None else time.monotonic() - sign.changed

    def stop(self, *, farewell: str | None) -> None:
        """Show no more signs.

        Args:
            farewell: Why this party leaves, for the others; None takes back the sign without a word.
        """
        self._stopping = True
        self._wake.set()
        self._thread.join()
        if self.is_replaced:
            return
        try:
            if farewell is None:
                self._register.delete(sign_of(self._name))
            else:
                self._register.write(sign_of(self._name), {"left": farewell})
        except UnreachableError:
            log.debug("[party %s] left without a goodbye: the rendezvous is gone", self._name)

    def _take_name(self) -> None:
        """Claim the name, or raise if another process under it lives: its sign changes while this one looks.

        Of two that start at once one must be refused before it has written anything else: each would go on
        overwriting what the other has said.
        """
        key, mine = sign_of(self._name), self._words | {"beat": 0}
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
        looked, alive = time.monotonic(), self._alive()
        while True:
            self._wake.wait(self._ttl_s / 6)
            self._wake.clear()
            if self._stopping or self.is_replaced:
                return
            # Who was stopped, or had no rendezvous, for a while has not looked: that is nobody else's death.
            missed = time.monotonic() - looked > self._ttl_s / 2
            try:
                self._round_trip()
            except (UnreachableError, RestartedError):
                missed = True
            if missed:
                self._forgive(alive)
            looked, alive = time.monotonic(), self._alive()

    def _round_trip(self) -> None:
        """Show a sign and look at those of the others."""
        if self._register.renew():
            log.info("[party %s] the rendezvous was restarted", self._name)
        standing, *signs = self._register.read(*map(sign_of, [self._name, *self._others]))
        if self._beats and self.is_foreign(standing):
            self.is_replaced = True
            return
        self._beats += 1
        with self._lock:
            mine = self._words | {"beat": self._beats}
        self._register.write(sign_of(self._name), mine)
        now = time.monotonic()
        with self._lock:
            for other, words in zip(self._others, signs, strict=True):
                self._see(other, words, now)

    def _see(self, other: str, words: Any, now: float) -> None:
        if not isinstance(words, dict):
            return  # a restarted store does not know it yet
        sign = self._signs.setdefault(other, _Sign())
        self._heard.add(str(words.get("incarnation")))
        if "left" in words:
            sign.changed = -math.inf  # at once
        elif sign.words != words:
            sign.changed = now
        sign.words = words

    def _alive(self) -> list[str]:
        return [other for other in self._others if self.alive(other)]

    def _forgive(self, parties: Sequence[str]) -> None:
        with self._lock:
            for sign in (self._signs[party] for party in parties):
                if "left" not in sign.words:
                    sign.changed = time.monotonic()


def sign_of(name: str) -> str:
    """Return the key of a party's sign of life."""
    return f"at/@{name}"
