"""The interface of exchanges, and the plain exchange."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from inspect import signature
from typing import Literal

from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm import Collectives, Communicator
from pellm_lightning.exchange.error_feedback import ErrorFeedback


class Exchange(ABC):
    """An all-reduce strategy: how the values of a round are summed over the parties. It is stateless.

    Example:
        >>> class Audited(Exchange):
        ...     def open(self, federation, on_reveal, view="", error_feedback=None):
        ...         print(f"{federation.num_parties} parties sum: {view}")
        ...         return federation
        >>> Audited()
        Audited()
    """

    is_secure: bool = False
    """Whether parties see sums only; rules that need single parties' values are then refused."""
    exact: bool = True
    """Whether float32 is summed to full precision; else what needs more digits is sent separately."""
    supports: Literal["parties", "sums", "rounded", "sparse"] = "parties"
    """What rules may use: single parties' values, sums only, values rounded in transit, or only means of
    updates that are sent sparsely."""
    min_participants: int = 1
    """Minimum number of participants of a sum."""

    def check(self, federation: Communicator) -> None:  # noqa: B027 (nothing to check is the rule)
        """Validate that the exchange can keep its guarantees in a federation.

        Raises:
            ValueError: If it cannot.
        """

    def new_error_feedback(self, vector: Tensor) -> ErrorFeedback | None:
        """Return the error-feedback residuals of a vector that is summed every round; None without any."""
        return None

    @abstractmethod
    def open(
        self,
        federation: Collectives,
        on_reveal: Callable[[], None],
        view: str = "",
        error_feedback: ErrorFeedback | None = None,
    ) -> Collectives:
        """Return the collectives of the current attempt; every party must call it.

        Args:
            federation: Collectives of the attempt's members.
            on_reveal: Called before this party reveals the key that unmasks a sum.
            view: This party's view of the attempt, such as the round and its participants. A secure exchange
                fails unless all views are equal: a forged list of participants would unmask a party's values.
            error_feedback: Residuals from ``new_error_feedback``; None if no vector is summed.
        """

    def __repr__(self) -> str:
        """Return the settings, which must be equal at every party: attributes named like the arguments."""
        settings = (f"{name}={getattr(self, name)!r}" for name in signature(type(self)).parameters)
        return f"{type(self).__name__}({', '.join(settings)})"


class Plain(Exchange):
    """Plain all-reduce: neighbours on the ring or star see the values that they add.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callback = FederatedAveraging(every_n_steps=100, exchange=Plain())
    """

    @override
    def open(
        self,
        federation: Collectives,
        on_reveal: Callable[[], None],
        view: str = "",
        error_feedback: ErrorFeedback | None = None,
    ) -> Collectives:
        """Return the federation's own collectives."""
        return federation


def as_exchange(exchange: object) -> Exchange:
    """Validate an ``exchange`` argument; None stands for ``Plain()``.

    Raises:
        ValueError: If it is not an exchange, such as a list of several.
    """
    if exchange is None:
        return Plain()
    if not isinstance(exchange, Exchange):
        raise ValueError(
            f"exchange={exchange!r:.200} must be one of pellm_lightning.exchange. Several cannot be combined:"
            " secure aggregation sums integers modulo 2^bits, and compressed codes cannot be added. To send"
            " fewer bytes use SecureAggregation(..., bits=32); to send the fewest, Quantized(...) or"
            " TopK(...) without secure aggregation."
        )
    return exchange
