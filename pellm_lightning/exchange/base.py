"""What an exchange is, and the open one."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from typing_extensions import override

from pellm_lightning.federation import Collectives


class Exchange(ABC):
    """How the values of a round are summed over the parties. Configuration only: it keeps nothing."""

    hides: bool = False
    """Whether parties see sums only; then what needs the parties' values one by one is refused."""
    min_counting: int = 1
    """Fewer parties than that never add up their values."""

    def check(self, federation: Collectives) -> None:  # noqa: B027 (nothing to check is the rule)
        """Refuse a federation in which the exchange would not keep its promise.

        Raises:
            ValueError: If it would not.
        """

    @abstractmethod
    def open(self, federation: Collectives, revealing: Callable[[], None], view: str = "") -> Collectives:
        """Return the collectives that sum for the present attempt; every party must call it.

        Args:
            federation: The parties that meet.
            revealing: Called before this party gives away what makes a sum of its values readable.
            view: What this party was told of the attempt, such as the round and who counts. An exchange that
                hides values fails unless all were told the same: who makes a party believe that others count,
                too, sees what it sends.
        """

    @abstractmethod
    def __repr__(self) -> str:
        """Return the settings that must be the same at every party."""


class Plain(Exchange):
    """Sum what the parties hold as it is: the neighbours that add it up see it."""

    @override
    def open(self, federation: Collectives, revealing: Callable[[], None], view: str = "") -> Collectives:
        """Return the federation itself."""
        return federation

    def __repr__(self) -> str:
        return "Plain()"
