"""Communicator of parties that are started together, by torchrun or as threads.

They meet at a store, and exchange in the shared memory of a host, and over Gloo between hosts.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm.collectives import concatenated, staged
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
from pellm_lightning.comm.errors import FederationError, PartyLostError
from pellm_lightning.comm.tls import TLS
from pellm_lightning.comm.topology import Topology
from pellm_lightning.comm.torchrun import shared_memory as shared
from pellm_lightning.comm.torchrun.gloo import GlooGroup, check_transport
from pellm_lightning.comm.torchrun.host_sockets import LateError
from pellm_lightning.comm.torchrun.lane import LEFT, Lane, Pending
from pellm_lightning.comm.torchrun.store import store_from_env
from pellm_lightning.comm.torchrun.store_coordinator import StoreCoordinator
from pellm_lightning.comm.torchrun.two_level import TwoLevelLane, over_hosts

# One Gloo group leaves cores idle while it waits for the network; two reduced in 0.78-0.9x of the time.
_NUM_LANES = 2
# Below this a second lane costs more latency than it gains. In shared memory tensors are cut alike, so that
# their sums have the same bits.
_SPLIT_BYTES = 4 << 20
# Metadata of a round, which has some 200 bytes, takes one gather; what does not fit takes a second.
SLOT_BYTES = 512
_LENGTH_BYTES = 4
_MAX_METADATA_BYTES = 4 << 20


class Federation(Communicator):
    """All parties of one launch, joined over a store; each constructs its own. If one is lost, all stop.

    Nothing here is global: N parties can be N threads of one process over one ``HashStore``. Over one store a
    party may join again after ``close()``; each joining gets fresh keys.

    Args:
        store: Any torch ``Store`` that all parties can reach.
        party: Index of this party, 0-based.
        num_parties: Number of parties.
        timeout_s: Seconds a party may be late, at joining and at each exchange. It must be longer than the
            time by which the slowest party's local steps outlast the fastest's.
        shared_memory: Whether parties that share a host exchange in its memory: if all want it and can. The
            environment variable ``PELLM_SHARED_MEMORY=0`` at one of them switches it off also.

    Raises:
        ValueError: If ``party``, ``num_parties`` or ``timeout_s`` is out of range.
        PartyLostError: If a party does not join within ``timeout_s``.

    Example:
        >>> import torch
        >>> from torch.distributed import HashStore
        >>> federation = Federation(HashStore(), party=0, num_parties=1)
        >>> federation.all_reduce_(torch.ones(2))
        tensor([1., 1.])
        >>> federation.close()
    """

    def __init__(
        self,
        store: dist.Store,
        party: int,
        num_parties: int,
        *,
        timeout_s: float = 1800,
        shared_memory: bool = True,
    ) -> None:
        if num_parties < 1 or not 0 <= party < num_parties:
            raise ValueError(f"party={party} must lie in 0..{num_parties - 1} for num_parties={num_parties}.")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s} must be positive, in seconds.")
        self.party = party
        self.names = self.roster = [str(index) for index in range(num_parties)]
        self.quorum = num_parties
        self.timeout_s = timeout_s
        self.bytes_sent = 0
        self.interrupt = lambda: None
        joined = store.add(f"pellm/joined/{party}", 1)
        self._store = dist.PrefixStore(f"pellm/{joined}", store)
        self._coordinator = StoreCoordinator(
            self._store, party, num_parties, timeout_s, interrupt=lambda: self.interrupt()
        )
        self._specs: list[PartySpec] = []
        self._closed = False
        self._lanes: list[Lane] = []
        if num_parties > 1:
            self._join(shared_memory)

    @classmethod
    def from_env(cls, num_parties: int | None = None, *, timeout_s: float = 1800) -> "Federation":
        """Join by the launcher's environment variables; None makes every launched process a party.

        Raises:
            ValueError: If this process is not the leader of its party.
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

    @classmethod
    def unjoined(cls, names: Sequence[str], party: int, tls: TLS | None) -> "Federation":
        """Return a stand-in for parties of which none has come yet: nothing can be exchanged.

        Args:
            names: Names of all parties.
            party: Index of this party.
            tls: This party's certificate, if it has one.
        """
        federation = cls(dist.HashStore(), 0, 1)
        federation.names = federation.roster = list(names)
        federation.party, federation.quorum, federation.tls = party, len(names), tls
        return federation

    @override
    def enter(self, phase: str) -> None:
        self._coordinator.enter(phase)

    @override
    def phases(self) -> dict[str, str]:
        return {str(party): phase for party, phase in self._coordinator.phases().items()}

    # ---- membership

    @override
    def gather_json(self, key: str, value: object) -> list[Any]:
        return self._coordinator.gather_json(key, value)

    @override
    def handshake(self, spec: PartySpec, digest: str, difference: Difference) -> dict[str, PartySpec]:
        self._specs = self.gather_json("party_spec", spec)
        return dict(zip(self.names, self._specs, strict=True))

    @override
    def party_specs(self) -> list[PartySpec]:
        return self._specs

    @override
    def join_quorum(
        self, intent: Intent, version: Version | None, metadata: Metadata, state: str = ""
    ) -> QuorumResult:
        """Wait for all parties.

        Parties are uneven: one validates while another is already in its next round. All send messages of one
        size first, so they can meet anywhere, and a party that came for something else joins again.
        """
        mine = json.dumps([intent, metadata], separators=(",", ":")).encode()
        try:
            with self._coordinator.waiting():
                read = [json.loads(message) for message in self._all_gather_bytes(mine)]
            intents = {intent for intent, _ in read}
            joined = {name: dict(of_party) for name, (_, of_party) in zip(self.names, read, strict=True)}
        except (ValueError, TypeError) as error:
            raise FederationError(
                f"Party {self.party} cannot read the metadata of another party ({error}). Install the same"
                " version of pellm-lightning at all parties."
            ) from error
        return QuorumResult(joined, exchanges=will_exchange(intents))

    # ---- tensors

    @override
    def all_reduce_(self, x: Tensor) -> Tensor:
        flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
        self.all_reduce_each_(in_pieces(flat))
        return x if x.is_contiguous() else x.copy_(flat.view_as(x))

    @override
    def all_reduce_each_(self, tensors: Iterable[Tensor]) -> None:
        under_way: list[tuple[Tensor, Tensor, Pending]] = []
        for index, tensor in enumerate(tensors):
            with self._translated():
                if self.num_parties > 1:
                    copy = tensor.detach().to("cpu")
                    self.bytes_sent += copy.nbytes
                    under_way.append((tensor, copy, self._lane(index).all_reduce(copy)))
        for tensor, copy, pending in under_way:
            with self._translated():
                pending.wait()
                if copy.data_ptr() != tensor.data_ptr():
                    tensor.copy_(copy)

    @override
    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        with self._translated(), staged(x) as copy:
            if self.num_parties > 1:
                self.bytes_sent += copy.nbytes if source == self.party else 0
                self._lane().broadcast(copy, source).wait()
        return x

    @override
    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        sent = concatenated(parts)
        out = sent.new_empty(sum(sizes))
        with self._translated():
            if self.num_parties > 1:
                own = parts[self.party].nbytes
                self.bytes_sent += sent.nbytes - own
                self._lane().all_to_all(out, sent, list(sizes), [part.numel() for part in parts]).wait()
            else:
                out.copy_(sent)
        return list(out.split(list(sizes)))

    @override
    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        if self.num_parties == 1:
            return super().all_gather(x, sizes)
        mine = x.detach().to("cpu").contiguous()
        out = mine.new_empty(sum(sizes))
        self.bytes_sent += mine.nbytes
        with self._translated():
            self._lane().all_gather(out, mine, list(sizes)).wait()
        return list(out.split(list(sizes)))

    @override
    def share_memory(self, size_bytes: int, *, willing: bool = True) -> Tensor | None:
        if self.num_parties == 1:
            return None
        with self._translated():
            return self._lane().share(size_bytes, willing=willing)

    @override
    def barrier(self, written: Sequence[Tensor] = ()) -> None:
        self.bytes_sent += sum(tensor.nbytes for tensor in written)
        with self._translated():
            if self.num_parties > 1:
                self._lane().barrier()

    def _all_gather_bytes(self, mine: bytes) -> list[bytes]:
        """Return every party's bytes, which may differ in length."""
        if self.num_parties == 1:
            return [mine]
        framed = len(mine).to_bytes(_LENGTH_BYTES, "little") + mine
        gathered, known, longest = [b""] * self.num_parties, 0, SLOT_BYTES
        while known < longest:
            self.bytes_sent += longest - known
            with self._translated():
                more = self._lane().all_gather_bytes(framed[known:longest], longest - known)
            gathered = [before + after for before, after in zip(gathered, more, strict=True)]
            ends = [_LENGTH_BYTES + int.from_bytes(start[:_LENGTH_BYTES], "little") for start in gathered]
            if max(ends) > _MAX_METADATA_BYTES:
                raise ValueError(f"it has {max(ends)} bytes, more than {_MAX_METADATA_BYTES}")
            known, longest = longest, max(SLOT_BYTES, *ends)
        return [message[_LENGTH_BYTES:end] for message, end in zip(gathered, ends, strict=True)]

    # ---- joining and leaving

    @override
    def close(self) -> None:
        if not self._closed and self._lanes:
            self._coordinator.leave_together()
        self._disconnect()

    @override
    def abort(self, reason: str | None = None) -> None:
        if not self._closed and self._lanes and reason is not None:
            self._coordinator.publish_reason(reason)
        self._disconnect()

    def _join(self, shared_memory: bool) -> None:
        check_transport()
        self._coordinator.wait_for_all()
        with self._translated():
            place = self.party, self.num_parties, self.timeout_s
            hosts, on_host = shared.open_lane(*place, self._coordinator.gather_json, wanted=shared_memory)
            if on_host is not None and len(hosts) == 1:
                self._lanes = [on_host]
                return
            for index in range(_NUM_LANES):
                group = GlooGroup(dist.PrefixStore(f"lane{index}", self._store), *place)
                self._lanes.append(group)
                if hosts:
                    store = dist.PrefixStore(f"hosts{index}", self._store)
                    self._lanes[-1] = TwoLevelLane(group, on_host, over_hosts(store, hosts, *place[::2]))

    def _disconnect(self) -> None:
        self._closed = True
        self._coordinator.close()
        for lane in self._lanes:
            lane.abort()
        self._lanes = []

    def _lane(self, index: int = 0) -> Lane:
        lanes = self._lanes
        if not lanes:
            raise RuntimeError(LEFT)
        return lanes[index % len(lanes)]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn torch's RuntimeErrors into ours, with the reason that the lost party has published, if any."""
        if self._closed:
            raise FederationError(
                f"Party {self.party} has left this federation. Join again with a new Federation."
            )
        try:
            yield
        except FederationError:
            self._disconnect()
            raise
        except RuntimeError as error:
            silent = error.parties if isinstance(error, LateError) else ()
            late = self._coordinator.timed_out(late=silent) if "imed out" in str(error) else None
            # A broken group stays broken, and its neighbours notice only when this party disconnects.
            self._disconnect()
            if late:
                raise late from error
            # While it was not asked for by its launcher yet, the exit code of a process can be read.
            ended = self._coordinator.ended()
            # The party that broke the connection writes its reason just before; give the store a moment.
            time.sleep(0.1)
            self._coordinator.raise_if_left(error)
            ended = self._coordinator.ended() | ended
            who = " and ".join(f"party {party} ({how})" for party, how in ended.items())
            advice = "A party's process ended without giving a reason: look at the end of its log."
            raise PartyLostError(
                f"Party {self.party} lost {who or 'the federation'} while {self._coordinator.phase}:"
                f" {_reason(error)}. {advice}",
                parties=[str(party) for party in ended],
            ) from error


def _reason(error: BaseException) -> str:
    """Return Gloo's message without the place in its source and without its advice."""
    message = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\] ", "", message).split(". ")[0]


def in_pieces(flat: Tensor) -> Sequence[Tensor]:
    """Cut a vector into the pieces that are summed one by one, which decide the order of its additions.

    Example:
        >>> import torch
        >>> len(in_pieces(torch.zeros(10)))
        1
    """
    return flat.chunk(_NUM_LANES) if flat.nbytes >= _SPLIT_BYTES else [flat]
