"""The federation: what joins the parties and the only object that moves tensors between them."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm.collectives import Collectives
from pellm_lightning.comm.errors import FederationError, PartyLostError
from pellm_lightning.comm.topology import Topology
from pellm_lightning.comm.torchrun.gloo import LEFT, GlooGroup
from pellm_lightning.comm.torchrun.store import store_from_env
from pellm_lightning.comm.torchrun.store_coordinator import StoreCoordinator

# One Gloo group leaves cores idle while it waits for the network; two reduced in 0.78-0.9x of the time.
_NUM_LANES = 2
# Below this a second lane costs more latency than it gains.
_SPLIT_BYTES = 4 << 20


class Federation(Collectives):
    """All parties of one launch, joined over a store; each constructs its own. If one is lost, all stop.

    Nothing here is global: N parties can be N threads of one process over one ``HashStore``. Over one store a
    party may join again after ``close()``; each joining gets fresh keys.

    Args:
        store: Any torch ``Store`` that all parties can reach.
        party: Index of this party, 0-based.
        num_parties: Number of parties.
        timeout_s: Seconds a party may be late, at joining and at each exchange. It must be longer than the
            time by which the slowest party's local steps outlast the fastest's.

    Raises:
        ValueError: If ``party``, ``num_parties`` or ``timeout_s`` is out of range.
        PartyLostError: If a party does not join within ``timeout_s``.
    """

    def __init__(self, store: dist.Store, party: int, num_parties: int, *, timeout_s: float = 1800) -> None:
        if num_parties < 1 or not 0 <= party < num_parties:
            raise ValueError(f"party={party} must lie in 0..{num_parties - 1} for num_parties={num_parties}.")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s} must be positive, in seconds.")
        self.party = party
        self.names = self.roster = [str(index) for index in range(num_parties)]
        self.timeout_s = timeout_s
        self.bytes_sent = 0
        joined = store.add(f"pellm/joined/{party}", 1)
        self._store = dist.PrefixStore(f"pellm/{joined}", store)
        self._board = StoreCoordinator(self._store, party, num_parties, timeout_s)
        self._closed = False
        self._lanes: list[GlooGroup] = []
        if num_parties > 1:
            self._join()

    @classmethod
    def from_env(cls, num_parties: int | None = None, *, timeout_s: float = 1800) -> "Federation":
        """Join by the launcher's environment variables; None makes every launched process a party.

        Raises:
            ValueError: If this process is not the one that speaks for its party.
            PartyLostError: If the rendezvous or a party cannot be reached.
        """
        topology = Topology.from_env(num_parties)
        if not topology.is_leader:
            raise ValueError(
                f"Process {topology.rank_in_party} of party {topology.party} must not join the federation:"
                " only a party's rank 0 speaks for it. Call Federation.from_env() there and broadcast inside"
                " the party."
            )
        return cls(store_from_env(timeout_s), topology.party, topology.num_parties, timeout_s=timeout_s)

    @override
    def enter(self, phase: str) -> None:
        self._board.enter(phase)

    @override
    def phases(self) -> dict[str, str]:
        return {str(party): phase for party, phase in self._board.phases().items()}

    # ---- tensors

    @override
    def all_reduce_(self, x: Tensor) -> Tensor:
        flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
        self.all_reduce_each_(flat.chunk(_NUM_LANES) if flat.nbytes >= _SPLIT_BYTES else [flat])
        return x if x.is_contiguous() else x.copy_(flat.view_as(x))

    @override
    def all_reduce_each_(self, tensors: Iterable[Tensor]) -> None:
        under_way: list[Callable[[], None]] = []
        for index, tensor in enumerate(tensors):
            with self._translated():
                under_way.append(self._start_all_reduce(tensor, index % _NUM_LANES))
        for finish in under_way:
            with self._translated():
                finish()

    @override
    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        staged = x.detach().to("cpu", copy=False).contiguous()
        with self._translated():
            if self.num_parties > 1:
                self.bytes_sent += staged.nbytes if source == self.party else 0
                self._lane().broadcast(staged, source).wait()
        return x if staged.data_ptr() == x.data_ptr() else x.copy_(staged)

    @override
    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        staged = torch.cat([part.detach().to("cpu") for part in parts])
        out = staged.new_empty(sum(sizes))
        with self._translated():
            if self.num_parties > 1:
                own = parts[self.party].nbytes
                self.bytes_sent += staged.nbytes - own
                self._lane().all_to_all(out, staged, list(sizes), [part.numel() for part in parts]).wait()
            else:
                out.copy_(staged)
        return list(out.split(list(sizes)))

    @override
    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        if self.num_parties == 1 or len(set(sizes)) > 1:
            return super().all_gather(x, sizes)
        mine = x.detach().to("cpu").contiguous()
        gathered = [torch.empty_like(mine) for _ in sizes]
        self.bytes_sent += mine.nbytes
        with self._translated():
            self._lane().all_gather(gathered, mine).wait()
        return gathered

    def _start_all_reduce(self, tensor: Tensor, lane: int) -> Callable[[], None]:
        """Start one reduction; the returned function waits for it and brings the sum back to the tensor."""
        if self.num_parties == 1:
            return lambda: None
        staged = tensor.detach().to("cpu")
        self.bytes_sent += staged.nbytes
        pending = self._lane(lane).all_reduce(staged)

        def finish() -> None:
            pending.wait()
            if staged.data_ptr() != tensor.data_ptr():
                tensor.copy_(staged)

        return finish

    # ---- words

    def all_gather_json(self, key: str, value: object) -> list[Any]:
        """Tell every party ``value`` through the store; return all parties' values in order.

        For small things that must be compared before any tensor moves; no pickle is involved.

        Raises:
            PartyLostError: If a party says nothing within ``timeout_s``.
        """
        return self._board.all_gather_json(key, value)

    # ---- coming and going

    @override
    def close(self) -> None:
        if not self._closed and self._lanes:
            self._board.part_together()
        self._leave()

    @override
    def abort(self, reason: str | None = None) -> None:
        if not self._closed and self._lanes and reason is not None:
            self._board.say_why(reason)
        self._leave()

    def _join(self) -> None:
        self._board.arrive()
        with self._translated():
            for lane in range(_NUM_LANES):
                store = dist.PrefixStore(f"lane{lane}", self._store)
                self._lanes.append(GlooGroup(store, self.party, self.num_parties, self.timeout_s))

    def _leave(self) -> None:
        self._closed = True
        for lane in self._lanes:
            lane.abort()
        self._lanes = []

    def _lane(self, lane: int = 0) -> GlooGroup:
        lanes = self._lanes
        if not lanes:
            raise RuntimeError(LEFT)
        return lanes[lane]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn torch's RuntimeErrors into ours, with the reason the lost party left behind, if it could."""
        if self._closed:
            raise FederationError(
                f"Party {self.party} has left this federation. Join again with a new Federation."
            )
        try:
            yield
        except RuntimeError as error:
            late = self._board.gave_up() if "imed out" in str(error) else None
            # A broken group stays broken, and only when this party hangs up do its neighbours notice, too.
            self._leave()
            if late:
                raise late from error
            # The party that broke the connection writes its reason just before; give the store a moment.
            time.sleep(0.1)
            self._board.raise_if_somebody_left(error)
            raise PartyLostError(
                f"Party {self.party} lost the federation while {self._board.phase}: {_reason(error)}. A"
                " party's process ended without a word: look at the end of its log."
            ) from error


def _reason(error: BaseException) -> str:
    """Return what Gloo has to say, without the place in its source and without its advice."""
    words = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\] ", "", words).split(". ")[0]
