"""Interface to collective operations on tensors, whatever carries the bytes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor

from pellm_lightning.comm.tls import TLS


class Collectives(ABC):
    """Collective operations of the parties that take part now; every one of them must call the same.

    A collective fails at all parties or at none that matters: a party that fails breaks its connections, and
    the tensors it worked on are then half done.

    Raises:
        PartyLostError: In any of them, if a party is lost or too late.

    Example:
        >>> import torch
        >>> from torch.distributed import HashStore
        >>> from pellm_lightning import Federation
        >>> collectives = Federation(HashStore(), party=0, num_parties=1)
        >>> collectives.all_reduce_(torch.ones(2))
        tensor([1., 1.])
        >>> collectives.close()
    """

    party: int
    """Index of this party among the members."""
    names: Sequence[str]
    """Names of the members, in their order."""
    bytes_sent: int
    """Bytes this party has sent to the others so far."""
    tls: TLS | None = None
    """This party's certificate, by which the others know it; None without TLS."""
    lossy: bool = False
    """Whether float32 that is gathered is rounded relative to its size: then send small differences."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "A joined federation cannot be pickled or copied, nor can what holds one: its connections belong"
            " to this process. Join where it is needed, as FederatedAveraging does in connect()."
        )

    @property
    def num_parties(self) -> int:
        """Number of members."""
        return len(self.names)

    @property
    def members(self) -> Sequence[int]:
        """Index in the roster of each member."""
        return range(self.num_parties)

    @property
    def place(self) -> tuple[int, int]:
        """Index of this party in the roster, and the size of the roster."""
        return self.party, self.num_parties

    @property
    def max_parties(self) -> int:
        """Number of parties that may ever take part."""
        return self.num_parties

    @property
    def name(self) -> str:
        """Name of this party."""
        return self.names[self.party]

    def called(self, parties: Iterable[int]) -> str:
        """Return the names of members, for a message."""
        return ", ".join(self.names[party] for party in parties)

    @abstractmethod
    def all_reduce_(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the parties, in place, and return it: the same bits on every party.

        Each number is added up along one way through the parties and its sum sent to all, so it does not
        matter what processors they have, only that these add by IEEE 754.

        Every party must pass the same shape and dtype at the same time; the schema check at the start of an
        ``Aggregator`` sees to that. A failure leaves ``x`` half reduced.
        """

    @abstractmethod
    def all_reduce_each_(self, tensors: Iterable[Tensor]) -> None:
        """Sum each of ``tensors`` (contiguous) over the parties, in place; a lazy iterable is fine."""

    @abstractmethod
    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite ``x`` by the one of party ``source``, in place, and return it."""

    @abstractmethod
    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send ``parts[i]`` to party i; return what the parties sent to this one, in order, on the CPU.

        Args:
            parts: One flat tensor per party, all of one dtype; each may have its own size, 0 included.
            sizes: Scalars that each party sends to this one. All must know beforehand who sends how much.
        """

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return every party's ``x``, in order, on the CPU.

        Args:
            x: Flat tensor; the parties' may differ in size, not in dtype.
            sizes: Scalars of each party's.
        """
        mine = x.detach().to("cpu").contiguous()
        gathered = [
            mine.clone() if party == self.party else mine.new_empty(size) for party, size in enumerate(sizes)
        ]
        for party, of_party in enumerate(gathered):
            self.broadcast_(of_party, party)
        return gathered


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Return flat tensors as one on the CPU: without a copy if they follow each other in one storage.

    Example:
        >>> whole = torch.arange(3.0)
        >>> concatenated(whole.split([1, 2])).data_ptr() == whole.data_ptr()
        True
    """
    first = parts[0].detach()
    storage, start = first.untyped_storage().data_ptr(), first.storage_offset()
    end = start
    for part in parts:
        follows = part.storage_offset() == end and part.untyped_storage().data_ptr() == storage
        if part.device.type != "cpu" or not part.is_contiguous() or not follows:
            return torch.cat([part.detach().to("cpu") for part in parts])
        end += part.numel()
    return first.as_strided((end - start,), (1,))


@contextmanager
def staged(x: Tensor) -> Iterator[Tensor]:
    """Lend a contiguous copy of ``x`` on the CPU, or ``x`` itself if it is one, and write it back."""
    copy = x.detach().to("cpu").contiguous()
    yield copy
    if copy.data_ptr() != x.data_ptr():
        x.copy_(copy)
