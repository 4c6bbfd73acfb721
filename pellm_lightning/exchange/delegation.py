"""Collectives that delegate to a federation's, for exchanges to override some of them."""

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm import Collectives


class DelegatingCollectives(Collectives):
    """Delegating wrapper around the collectives of a federation, for one attempt.

    Args:
        federation: The collectives to wrap.
    """

    def __init__(self, federation: Collectives) -> None:
        self._federation = federation
        self.party = federation.party
        self.names = federation.names

    @property
    @override
    def bytes_sent(self) -> int:  # type: ignore[override]
        return self._federation.bytes_sent

    @property
    @override
    def members(self) -> Sequence[int]:
        return self._federation.members

    @property
    @override
    def place(self) -> tuple[int, int]:
        return self._federation.place

    @property
    @override
    def max_parties(self) -> int:
        return self._federation.max_parties

    @override
    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        """Broadcast as it is: only sums, which all may see, are broadcast."""
        return self._federation.broadcast_(x, source)
