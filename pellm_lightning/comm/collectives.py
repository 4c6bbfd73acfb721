"""What moves tensors between the parties, whoever they are at the moment and whatever carries the bytes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NoReturn, SupportsIndex

from torch import Tensor


class Collectives(ABC):
    """The parties that meet now, and what they can do together; every one of them must call the same.

    A collective fails at all parties or at none that matters: whoever fails breaks its connections, and what
    it worked on is then half done.
    """

    party: int
    """Index of this party among those that meet."""
    names: Sequence[str]
    """Names of the parties that meet, in their order."""
    roster: Sequence[str]
    """Names of all parties that may ever meet, present or not."""
    timeout_s: float
    """Seconds a party may be late."""
    bytes_sent: int
    """Bytes this party has handed to the others so far."""
    lossy: bool = False
    """Whether float32 that is gathered comes rounded, by so much of its size: then send small differences."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "A joined federation cannot be pickled or copied, nor can what holds one: its connections belong"
            " to this process. Join where it is needed; a FederatedAveraging whose connect()"
            " you override does."
        )

    @property
    def num_parties(self) -> int:
        """Number of parties that meet."""
        return len(self.names)

    @property
    def members(self) -> Sequence[int]:
        """Index in the federation of each party that meets."""
        return range(self.num_parties)

    @property
    def place(self) -> tuple[int, int]:
        """Index of this party in the federation, and how many there are, present or not."""
        return self.party, self.num_parties

    @property
    def max_parties(self) -> int:
        """Number of parties that may ever meet."""
        return self.num_parties

    @property
    def name(self) -> str:
        """Name of this party."""
        return self.names[self.party]

    def called(self, parties: Iterable[int]) -> str:
        """Return the names of parties, for a message."""
        return ", ".join(self.names[party] for party in parties)

    @abstractmethod
    def enter(self, phase: str) -> None:
        """Say what this party does from now on, so that errors at any party can tell where each one was."""

    def phases(self) -> dict[str, str]:
        """Return what each party does, by name, as far as it is known here; any thread may ask."""
        return {}

    @abstractmethod
    def all_reduce_(self, x: Tensor) -> Tensor:
        """Sum ``x`` over the parties, in place, and return it: the same bits on every party.

        Each number is added up along one way through the parties and its sum sent to all, so it does not
        matter what processors they have, only that these add by IEEE 754.

        Every party must pass the same shape and dtype at the same time; the schema check at the start of an
        ``Aggregator`` sees to that. A failure leaves ``x`` half reduced.

        Raises:
            PartyLostError: If a party is gone or later than ``timeout_s``.
        """

    @abstractmethod
    def all_reduce_each_(self, tensors: Iterable[Tensor]) -> None:
        """Sum each of ``tensors`` (contiguous) over the parties, in place; a lazy iterable is fine.

        Raises:
            PartyLostError: If a party is gone or later than ``timeout_s``.
        """

    @abstractmethod
    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite ``x`` by the one of party ``source``, in place, and return it.

        Raises:
            PartyLostError: If a party is gone or later than ``timeout_s``.
        """

    @abstractmethod
    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send ``parts[i]`` to party i; return what the parties sent to this one, in order, on the CPU.

        Args:
            parts: One flat tensor per party, all of one dtype; each may have its own size, 0 included.
            sizes: Scalars that each party sends to this one. All must know beforehand who sends how much.

        Raises:
            PartyLostError: If a party is gone or later than ``timeout_s``.
        """

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return every party's ``x``, in order, on the CPU.

        Args:
            x: Flat tensor; the parties' may differ in size, not in dtype.
            sizes: Scalars of each party's.

        Raises:
            PartyLostError: If a party is gone or later than ``timeout_s``.
        """
        mine = x.detach().to("cpu").contiguous()
        gathered = [
            mine.clone() if party == self.party else mine.new_empty(size) for party, size in enumerate(sizes)
        ]
        for party, of_party in enumerate(gathered):
            self.broadcast_(of_party, party)
        return gathered

    @abstractmethod
    def close(self) -> None:
        """Part together: leave when no party needs the others any more. Every party must call it."""

    @abstractmethod
    def abort(self, reason: str | None = None) -> None:
        """Leave at once: what others wait for fails in seconds, not after the timeout, and tells the reason.

        Args:
            reason: What happened here; None if the others know already. After ``close()`` nothing happens.
        """
