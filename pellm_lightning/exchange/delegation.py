"""Collectives that change how sums are formed, and leave membership to the communicator."""

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm import Collectives


class DelegatingCollectives(Collectives):
    """The collectives of one attempt over those of a federation.

    Args:
        federation: The parties that take part.
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
        """Overwrite what all have by one party's: for what is a sum already."""
        return self._federation.broadcast_(x, source)
