"""Interface of lanes: what carries the collectives of one launch."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

LEFT = "this party has left the group"


class Pending(Protocol):
    """Handle of a collective under way."""

    def wait(self) -> None:
        """Block until the collective is complete.

        Raises:
            RuntimeError: If it failed or timed out.
        """


class Lane(ABC):
    """Lane of collectives over all parties of one launch; their tensors are on the CPU and contiguous.

    Each raises RuntimeError, at once or in ``wait()``, if a party is lost or late.
    """

    rank: int
    """This party."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> Pending:
        """Start to sum a tensor in place."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int) -> Pending:
        """Start to overwrite a tensor by the one of party ``source``."""

    @abstractmethod
    def all_gather(self, out: Tensor, tensor: Tensor, sizes: list[int]) -> Pending:
        """Start to fill ``out`` by the parties' ``tensor``, all flat, of any sizes."""

    @abstractmethod
    def all_to_all(self, out: Tensor, tensor: Tensor, out_sizes: list[int], sizes: list[int]) -> Pending:
        """Start to send each party its part of ``tensor``, flat, and to fill ``out`` by theirs."""

    @abstractmethod
    def all_gather_bytes(self, message: bytes, size: int) -> list[bytes]:
        """Return the parties' messages, each of up to ``size`` bytes, in order; zeros may follow them."""

    def share(self, size_bytes: int, *, willing: bool) -> Tensor | None:
        """Return zeroed memory that all parties have mapped, (size_bytes,) uint8; None if they cannot.

        Args:
            size_bytes: Size, the same at all parties.
            willing: Whether this party wants it.
        """
        return None

    def barrier(self) -> None:
        """Wait for all parties; what they have written into shared memory before can be read then."""
        self.all_reduce(torch.zeros(1)).wait()

    @abstractmethod
    def abort(self) -> None:
        """Break all connections, so that whoever waits for this party notices at once."""
