"""What the parties of every contender average, what is noted about it, and how the result is checked.

It runs inside each contender's own environment, so it needs nothing but numpy. A party's round is told by two
moments of the clock that all processes of one host share:

    ready   all parties have their values in memory, and have met
    have    the party has the mean in memory, as arrays

and a round took from the last party's `ready` to the last party's `have`.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from shapes import CASES

_TABLE = 1 << 20
_MEETING_S = 300.0


@dataclass(frozen=True)
class Session:
    """One run of one contender: its processes start, make so many rounds, and end."""

    folder: str
    case: str
    parties: int
    rounds: int
    weighted: bool
    variant: str
    ports: tuple[int, ...]

    @classmethod
    def from_env(cls) -> "Session":
        return cls(**json.loads(os.environ["PEERS_SESSION"]))

    def to_env(self) -> dict[str, str]:
        return {"PEERS_SESSION": json.dumps(asdict(self))}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        # A tiny case, for the tests of the driver.
        return CASES["small"][:4] if self.case == "tiny" else CASES[self.case]

    @property
    def weights(self) -> list[float]:
        """What each party counts: 1, 2, 3 ... or, where a contender knows no weights, all alike."""
        return [1.0 + party if self.weighted else 1.0 for party in range(self.parties)]

    def finished(self) -> bool:
        """Whether every party has every mean."""
        return all(len(self.events(party, "have")) == self.rounds for party in range(self.parties))

    def events(self, party: int, kind: str) -> dict[int, dict]:
        """Return what a party noted, by round."""
        path = Path(self.folder, f"party-{party}.jsonl")
        lines = path.read_text().splitlines() if path.exists() else []
        return {event["round"]: event for event in map(json.loads, lines) if event["kind"] == kind}


class Party:
    """What one party brings into each round, and what it makes of the result."""

    def __init__(self, session: Session, party: int) -> None:
        self.session, self.party = session, party
        largest = max(n * m for n, m in session.shapes)
        self._table = np.random.default_rng(0).standard_normal(_TABLE + largest, dtype=np.float32)

    @property
    def weight(self) -> float:
        return self.session.weights[self.party]

    def fill_(self, arrays: Sequence[np.ndarray], round: int) -> None:
        """Write the party's values of a round: other ones for each party, round and array."""
        for index, array in enumerate(arrays):
            array[...] = self._values(self.party, round, index).reshape(array.shape)

    def ready(self, round: int) -> None:
        """Wait until all parties are here with their values, and note the time."""
        meeting = Path(self.session.folder, "meeting")
        meeting.mkdir(exist_ok=True)
        (meeting / f"{round}-{self.party}").touch()
        others = [meeting / f"{round}-{party}" for party in range(self.session.parties)]
        end = time.monotonic() + _MEETING_S
        while others:
            if others[-1].exists():
                others.pop()
            elif time.monotonic() > end:
                raise TimeoutError(
                    f"Party {self.party} waited {_MEETING_S:.0f} s for {others[-1].name} (round-party) to be"
                    f" ready. The logs in {self.session.folder} say what that party did."
                )
            else:
                time.sleep(0.0005)
        self._note("ready", round, time.monotonic())

    def have(self, round: int, arrays: Sequence[np.ndarray]) -> None:
        """Note the time at which the mean is here, then how far it is off."""
        now = time.monotonic()
        self._note("have", round, now, error=self._error(round, arrays))

    def _error(self, round: int, arrays: Sequence[np.ndarray]) -> float:
        """Return the 2-norm of result minus weighted mean over that of the mean, in float64."""
        off = length = 0.0
        for array, mean in zip(arrays, self._means(round), strict=True):
            off += float(((array.reshape(-1) - mean) ** 2).sum())
            length += float((mean**2).sum())
        return (off / length) ** 0.5

    def _means(self, round: int) -> Iterator[np.ndarray]:
        weights = self.session.weights
        for index in range(len(self.session.shapes)):
            terms = (w * self._values(p, round, index).astype(np.float64) for p, w in enumerate(weights))
            yield sum(terms) / sum(weights)  # type: ignore[misc]

    def _values(self, party: int, round: int, index: int) -> np.ndarray:
        """Return (N,) float32: a window of the table, whose start the three numbers decide."""
        n, m = self.session.shapes[index]
        start = (7919 * index + 104_729 * party + 611_953 * round) % _TABLE
        return self._table[start : start + n * m]

    def _note(self, kind: str, round: int, at: float, **more: float) -> None:
        event = {"kind": kind, "round": round, "at": at, **more}
        with open(Path(self.session.folder, f"party-{self.party}.jsonl"), "a") as file:
            file.write(json.dumps(event) + "\n")
