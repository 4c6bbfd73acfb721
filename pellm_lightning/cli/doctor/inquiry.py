"""Who is there, and what they say: answers of those who come, silence of those who do not."""

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pellm_lightning.comm.elastic.register import Register
from pellm_lightning.comm.polling import polls


class Answer(NamedTuple):
    """What a party said."""

    value: Any
    heard: float
    """When this party read it, in seconds since the epoch by its own clock."""


class Survey:
    """The parties of a roster tell each other small things; nobody is waited for longer than said.

    Every process draws a number, and all that it writes bears it. Who has written this process's number after
    its own is there now; what an earlier inquiry left behind cannot have.

    Args:
        register: Where they write, not used by anybody else.
        name: This party.
        roster: Names of all parties.
        now: This party's clock, in seconds since the epoch.
    """

    def __init__(
        self, register: Register, name: str, roster: Sequence[str], now: Callable[[], float] = time.time
    ) -> None:
        self.now = now
        self._register = register
        self._name = name
        self._roster = roster
        self._numbers = {name: secrets.token_hex(8)}
        self._keys: list[str] = []
        register.renew()

    @property
    def present(self) -> list[str]:
        """Who is there, in the order of the roster."""
        return [name for name in self._roster if name in self._numbers]

    @property
    def numbers(self) -> list[str]:
        """What the processes that are there drew, in their order: of no other inquiry, ever."""
        return [self._numbers[name] for name in self.present]

    def meet(self, wait_s: float) -> list[str]:
        """Wait for all; return who is there.

        Raises:
            UnreachableError, RestartedError: If the register is.
        """
        mine, others = self._numbers[self._name], [name for name in self._roster if name != self._name]
        seen: dict[str, str] = {}
        self._say("here", {"number": mine, "seen": seen})
        for _ in polls(wait_s):
            told = dict(zip(others, self._read("here", others), strict=True))
            numbers = {name: str(said.get("number")) for name, said in told.items() if said}
            if numbers != seen:
                seen = numbers
                self._say("here", {"number": mine, "seen": seen})
            here = [name for name, said in told.items() if _seen_by(said).get(self._name) == mine]
            if len(here) == len(others):
                break
        self._numbers |= {name: seen[name] for name in here}
        return self.present

    def ask(self, topic: str, value: Any, wait_s: float) -> dict[str, Answer]:
        """Tell ``value`` to those who are there; return what they tell of the same, this party's included.

        Who says nothing within ``wait_s`` is left out.

        Raises:
            UnreachableError, RestartedError: If the register is.
        """
        self._say(topic, {"number": self._numbers[self._name], "value": value})
        answers: dict[str, Answer] = {}
        for _ in polls(wait_s):
            missing = [name for name in self.present if name not in answers]
            for name, said in zip(missing, self._read(topic, missing), strict=True):
                if said.get("number") == self._numbers[name] and "value" in said:
                    answers[name] = Answer(said["value"], self.now())
            if len(answers) == len(self.present):
                break
        return {name: answers[name] for name in self.present if name in answers}

    def part(self, wait_s: float) -> None:
        """Return when all are through; remove what this party has said, but for its goodbye.

        Raises:
            UnreachableError, RestartedError: If the register is.
        """
        said = list(self._keys)
        self.ask("goodbye", True, wait_s)
        self._register.delete(*said)

    def _say(self, topic: str, words: dict[str, Any]) -> None:
        key = _key(self._name, topic)
        if key not in self._keys:
            self._keys.append(key)
        self._register.write(key, words)

    def _read(self, topic: str, names: Sequence[str]) -> list[dict[str, Any]]:
        said = self._register.read(*(_key(name, topic) for name in names))
        return [words if isinstance(words, dict) else {} for words in said]


def offsets(delays: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return by how many seconds each clock is ahead of the first party's.

    Args:
        delays: ``delays[i][j]`` is when party i read what party j said, by i's clock, minus when j said it,
            by j's. What it took on the way cancels if it took as long both ways; it is a fraction of a
            second.
    """
    first = next(iter(delays), None)
    return {
        name: 0.0 if name == first else (of_party[first] - delays[first][name]) / 2
        for name, of_party in delays.items()
        if first is not None and (name == first or (first in of_party and name in delays[first]))
    }


def clocks(inquiry: Survey, wait_s: float) -> dict[str, float]:
    """Return by how many seconds each party's clock is ahead of the first party's, of those who answer.

    All must have answered something just before: who asks late measures its lateness.
    """
    heard = inquiry.ask("clock", inquiry.now(), wait_s)
    delays = {name: answer.heard - _number(answer.value) for name, answer in heard.items()}
    told = inquiry.ask("delays", delays, wait_s)
    return offsets(
        {
            name: {str(other): _number(delay) for other, delay in answer.value.items()}
            for name, answer in told.items()
            if isinstance(answer.value, dict)
        }
    )


def _seen_by(said: dict[str, Any]) -> dict[str, Any]:
    seen = said.get("seen")
    return seen if isinstance(seen, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _key(name: str, topic: str) -> str:
    return f"doctor/@{name}/{topic}"
