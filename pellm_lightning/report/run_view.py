"""What a live view shows of a federation, and the interface of the view."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pellm_lightning.engine.round_report import RoundReport


@dataclass(frozen=True)
class RunView:
    """State of a federation as one party sees it.

    Example::

        RunView(0, ["berlin", "oslo"], callback.rounds, phases=dict)

    Args:
        party: Index of this party.
        names: Of all parties.
        rounds: Reports of the rounds so far; grows during training.
        phases: Returns what each party is doing, by name; any thread may call it.
    """

    party: int
    names: Sequence[str]
    rounds: Sequence[RoundReport]
    phases: Callable[[], dict[str, str]]


@runtime_checkable
class LiveView(Protocol):
    """Interface of a progress bar that shows a federation; ``FederationProgressBar`` is one."""

    quiet: bool
    """Whether it shows nothing, so that each round is logged as a line."""

    def watch(self, run: RunView) -> None:
        """Show this federation from now on."""
