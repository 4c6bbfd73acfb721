"""What an exchange is, and the open one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm import Collectives, Communicator
from pellm_lightning.exchange.error_feedback import ErrorFeedback


class Exchange(ABC):
    """How the values of a round are summed over the parties. Configuration only: it keeps nothing."""

    is_secure: bool = False
    """Whether parties see sums only; then what needs the parties' values one by one is refused."""
    exact: bool = True
    """Whether a sum of float32 is no less exact than float32; else what needs more digits crosses apart."""
    supports: Literal["parties", "sums", "rounded", "sparse"] = "parties"
    """What rules get of the parties: their values, sums only, values that were rounded on the way, or only
    means of updates that are sent in parts."""
    min_counting: int = 1
    """Fewer parties than that never add up their values."""

    def check(self, federation: Communicator) -> None:  # noqa: B027 (nothing to check is the rule)
        """Refuse a federation in which the exchange would not keep its promise.

        Raises:
            ValueError: If it would not.
        """

    def new_error_feedback(self, vector: Tensor) -> ErrorFeedback | None:
        """Return what a party keeps from round to round of what it sums in a vector; None keeps nothing."""
        return None

    @abstractmethod
    def open(
        self,
        federation: Collectives,
        revealing: Callable[[], None],
        view: str = "",
        error_feedback: ErrorFeedback | None = None,
    ) -> Collectives:
        """Return the collectives that sum for the present attempt; every party must call it.

        Args:
            federation: The parties that meet.
            revealing: Called before this party gives away what makes a sum of its values readable.
            view: What this party was told of the attempt, such as the round and who counts. An exchange that
                hides values fails unless all were told the same: who makes a party believe that others count,
                too, sees what it sends.
            error_feedback: What this party keeps from round to round, as ``error_feedback()`` made it; None if no vector is
                summed.
        """

    @abstractmethod
    def __repr__(self) -> str:
        """Return the settings that must be the same at every party."""


class Plain(Exchange):
    """Sum what the parties hold as it is: the neighbours that add it up see it."""

    @override
    def open(
        self,
        federation: Collectives,
        revealing: Callable[[], None],
        view: str = "",
        error_feedback: ErrorFeedback | None = None,
    ) -> Collectives:
        """Return the federation itself."""
        return federation

    def __repr__(self) -> str:
        return "Plain()"


def chosen(exchange: object) -> Exchange:
    """Return the exchange that a user chose, ``Plain()`` for None.

    Raises:
        ValueError: If it is none, such as a list of several.
    """
    if exchange is None:
        return Plain()
    if not isinstance(exchange, Exchange):
        raise ValueError(
            f"exchange={exchange!r:.200} must be one of pellm_lightning.exchange. Several cannot be combined:"
            " a masked sum is one of whole numbers modulo 2^bits, of which no code could be added up. To send"
            " fewer bytes under masks use SecureAggregation(..., bits=32); to send the fewest, Quantized(...) or"
            " TopK(...) without masks."
        )
    return exchange
