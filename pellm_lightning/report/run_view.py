"""What a live view looks at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pellm_lightning.engine.round_report import RoundReport


@dataclass(frozen=True)
class RunView:
    """A federation as one party sees it.

    Args:
        party: Index of this party.
        names: Of all parties.
        rounds: Reports of the rounds so far; grows while training goes on.
        phases: Returns what each party does at the moment, by name; any thread may call it.
    """

    party: int
    names: Sequence[str]
    rounds: Sequence[RoundReport]
    phases: Callable[[], dict[str, str]]


@runtime_checkable
class LiveView(Protocol):
    """A progress bar that shows a federation."""

    quiet: bool
    """Whether it shows nothing, so that rounds are told in lines."""

    def watch(self, watched: RunView) -> None:
        """Show this federation from now on."""
