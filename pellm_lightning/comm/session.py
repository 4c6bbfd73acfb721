"""PartySession: a party's membership in a federation, from joining the other parties to leaving them."""

from collections.abc import Callable

from pellm_lightning.comm.communicator import Communicator
from pellm_lightning.comm.errors import FederationError
from pellm_lightning.comm.party import Party
from pellm_lightning.comm.topology import Topology


class PartySession:
    """Session of a party with the other parties, in each of its processes.

    Args:
        topology: Party and rank of this process, as far as they are known before it joins.
        connect: Joins the other parties; called by the leader only.

    Example:
        >>> from torch.distributed import HashStore
        >>> from pellm_lightning import Federation
        >>> session = PartySession(Topology(), lambda: Federation(HashStore(), party=0, num_parties=1))
        >>> session.join()
        >>> session.party.topology.num_parties
        1
        >>> session.close()
    """

    def __init__(self, topology: Topology, connect: Callable[[], Communicator]) -> None:
        self.party = Party(topology)
        """This party's processes."""
        self.communicator: Communicator | None = None
        """The joined parties, in the leader; None in its party's other processes."""
        self._connect = connect
        self._has_joined = self._has_left = False

    def join(self) -> None:
        """Join the other parties, and take this party's name from them; nothing if it has joined already.

        Raises:
            PartyLostError: If the rendezvous or a party cannot be reached.
        """
        if self._has_joined:
            return
        own = self.party.topology

        def join_as_leader() -> tuple[int, int, str]:
            joined = self.communicator = self._connect()
            return *joined.place, joined.name

        party, num_parties, name = self.party.on_leader(join_as_leader)
        self.party.topology = Topology(party, num_parties, own.rank_in_party, own.party_size, name)
        self._has_joined = True

    @property
    def leading(self) -> Communicator:
        """The joined parties, for the leader only."""
        if self.communicator is None:
            raise RuntimeError("Only a party's leader communicates with other parties, once it has joined.")
        return self.communicator

    def close(self) -> None:
        """Leave together with the others, when none needs another any more."""
        if self.communicator is not None:
            self.communicator.close()
        self._has_left = True

    def leave(self, reason: str | None) -> None:
        """Leave at once; nothing if this party has left already.

        Args:
            reason: What is reported to the others; None if they know.
        """
        if self.communicator is not None and not self._has_left:
            self.communicator.abort(reason)
        self._has_left = True

    def fail(self, error: BaseException) -> str:
        """Leave at once, so that the other parties fail in seconds with the reason; return it."""
        said = str(error)  # nothing, of a KeyboardInterrupt
        why = type(error).__name__ + (f": {said}" if said else "")
        # Of a FederationError the others know already, from us or from the party that caused it.
        self.leave(None if isinstance(error, FederationError) else why)
        return why
