"""SimulatedCommunicator: one simulated party's way to the others, through the worker that holds it."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm.communicator import (
    Communicator,
    Difference,
    Intent,
    Metadata,
    PartySpec,
    QuorumResult,
    Version,
    will_exchange,
)
from pellm_lightning.comm.simulated.held_parties import HeldParties
from pellm_lightning.comm.torchrun.federation import in_pieces


class SimulatedCommunicator(Communicator):
    """Communicator of a simulated party; it belongs to a place, which another party has in each round.

    Its members are the parties of the present round, by the names of the whole federation's roster. The
    worker joins and leaves the launch's other processes for all that it holds.

    Args:
        held: The parties of the round, of which this process holds some.
        place: Index among them.

    Example:
        >>> import torch
        >>> from torch.distributed import HashStore
        >>> from pellm_lightning import Federation
        >>> held = HeldParties(Federation(HashStore(), party=0, num_parties=1), num_parties=9, places=2)
        >>> held.assign([3, 8])
        >>> both = [SimulatedCommunicator(held, place) for place in held.local]
        >>> held.run([lambda one=one: one.all_reduce_(torch.ones(2)) for one in both])
        [tensor([2., 2.]), tensor([2., 2.])]
        >>> both[1].name
        '8'
    """

    def __init__(self, held: HeldParties, place: int) -> None:
        self._held = held
        self.party = place
        self.roster = [str(party) for party in range(held.num_parties)]
        self.quorum = len(held.parties)
        self.timeout_s = held.workers.timeout_s
        self.bytes_sent = 0
        self.interrupt = lambda: None
        self._specs: list[PartySpec] = []

    @property
    def names(self) -> Sequence[str]:  # type: ignore[override]  # they change from round to round
        """Names of the parties of this round, in their order."""
        return self._held.names

    @property
    @override
    def members(self) -> Sequence[int]:
        return self._held.parties

    @property
    @override
    def place(self) -> tuple[int, int]:
        return self._held.parties[self.party], self._held.num_parties

    # ---- membership

    @override
    def enter(self, phase: str) -> None:
        if self.party == self._held.local.start:
            self._held.workers.enter(phase)

    @override
    def phases(self) -> dict[str, str]:
        return self._held.workers.phases()

    @override
    def gather_json(self, key: str, value: object) -> list[Any]:
        return self._held.meet(self.party, value, self._held.gather)

    @override
    def handshake(self, spec: PartySpec, digest: str, difference: Difference) -> dict[str, PartySpec]:
        """Compare one party of each worker: all that a worker holds are of one module."""
        workers = self._held.workers
        specs = self._held.meet(self.party, spec, lambda brought: workers.gather_json("spec", brought[0]))
        self._specs = [spec for spec, there in zip(specs, self._held.held, strict=True) for _ in there]
        return {f"of process {worker}": spec for worker, spec in enumerate(specs)}

    @override
    def party_specs(self) -> list[PartySpec]:
        return self._specs

    @override
    def join_quorum(
        self, intent: Intent, version: Version | None, metadata: Metadata, state: str = ""
    ) -> QuorumResult:
        brought = self._held.meet(self.party, [intent, metadata], self._held.gather)
        joined = {name: dict(said) for name, (_, said) in zip(self.names, brought, strict=True)}
        return QuorumResult(joined, exchanges=will_exchange({intent for intent, _ in brought}))

    # ---- tensors

    @override
    def all_reduce_(self, x: Tensor) -> Tensor:
        flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
        self.all_reduce_each_(in_pieces(flat))
        return x if x.is_contiguous() else x.copy_(flat.view_as(x))

    @override
    def all_reduce_each_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.bytes_sent += tensor.nbytes
            self._held.meet(self.party, tensor.detach().view(-1), self._held.sum_)

    @override
    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        self.bytes_sent += x.nbytes if source == self.party else 0
        self._held.meet(self.party, x.detach(), lambda brought: self._held.broadcast(brought, source))
        return x

    @override
    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        self.bytes_sent += sum(part.nbytes for part in parts) - parts[self.party].nbytes
        received = self._held.meet(self.party, (parts, sizes), self._held.all_to_all)
        return received[self.party - self._held.local.start]

    # ---- the worker leaves for all that it holds

    @override
    def close(self) -> None:
        """Do nothing: the worker closes its own communicator."""

    @override
    def abort(self, reason: str | None = None) -> None:
        """Do nothing: the worker aborts its own communicator."""
