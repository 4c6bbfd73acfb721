"""Secure aggregation: masked sums, of which only the total is revealed.

A party's numbers are encoded as fixed-point integers (``fixed_point.py``) and masked twice. The pairwise mask
that it shares with each other party is added by one and subtracted by the other, so these cancel in the sum.
Its self mask stays in the sum until every party has confirmed that it holds the sum; only then all reveal
the seeds of these. The protocol is that of Bonawitz et al. 2017 (CCS, doi:10.1145/3133956.3133982) without
its recovery of dropped parties: here a lost party fails the attempt, which is repeated without it.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from typing_extensions import override

from pellm_lightning.comm import Collectives, FederationError
from pellm_lightning.exchange.delegation import DelegatingCollectives
from pellm_lightning.exchange.secure import key_agreement
from pellm_lightning.exchange.secure.fixed_point import KEY_BYTES, FixedPoint, KeyStream

# Aggregation rules sum values scaled by shares, of the order of one: there is room for more fractional bits.
_FINE_BITS = 40

# Integer buffers of a federation's attempts, by the index of the tensor in its sum.
_buffers: WeakKeyDictionary[Collectives, dict[int, Tensor]] = WeakKeyDictionary()


class MaskedTensor(NamedTuple):
    """A tensor of a masked sum, before its self masks are revealed."""

    tensor: Tensor
    numbers: Tensor
    """The tensor, or its copy on the CPU."""
    integers: Tensor
    """Its masked integers, then their sum; may share the memory of ``numbers``."""
    encoding: FixedPoint


class SecAggCollectives(DelegatingCollectives):
    """Secure collectives of one attempt: masked sums only, gathering single parties' values is refused.

    ``all_reduce_each_`` sums the vector of a round: float32 with the configured bits, all else with 64.
    ``all_reduce_`` sums what a rule computed, of the order of one, with 64 bits, 40 of them fractional.

    Args:
        federation: Collectives of the attempt's members.
        keys: Pairwise key shared with each other party, by its index; for this attempt only.
        bits: Width of the integers that encode float32.
        fractional_bits: Fractional bits of float32.
        on_reveal: Called before this party reveals the seed of its self mask.
    """

    def __init__(
        self,
        federation: Collectives,
        keys: Mapping[int, bytes],
        bits: int,
        fractional_bits: int,
        on_reveal: Callable[[], None],
    ) -> None:
        super().__init__(federation)
        self._keys = keys
        self._standard = FixedPoint(bits, fractional_bits, federation.num_parties)
        self._wide = FixedPoint(64, min(fractional_bits, 32), federation.num_parties)
        self._fine = FixedPoint(64, _FINE_BITS, federation.num_parties)
        self._on_reveal = on_reveal
        self._num_sums = 0
        self._buffers = _buffers.setdefault(federation, {})

    # ---- tensors

    @override
    def all_reduce_(self, x: Tensor) -> Tensor:
        flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
        self._sum_each_([flat], lambda dtype: self._fine)
        return x if x.is_contiguous() else x.copy_(flat.view_as(x))

    @override
    def all_reduce_each_(self, tensors: Iterable[Tensor]) -> None:
        self._sum_each_(tensors, lambda dtype: self._standard if dtype == torch.float32 else self._wide)

    @override
    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        raise self._refused()

    @override
    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        raise self._refused()

    # ---- the protocol

    def _sum_each_(
        self, tensors: Iterable[Tensor], encoding_for: Callable[[torch.dtype], FixedPoint]
    ) -> None:
        seed = secrets.token_bytes(KEY_BYTES)
        masked: list[MaskedTensor] = []
        self._federation.all_reduce_each_(self._mask(tensors, seed, encoding_for, masked))
        self._confirm()
        self._on_reveal()
        masks = [KeyStream(key) for key in key_agreement.all_gather_bytes(self._federation, seed, KEY_BYTES)]
        for tensor, numbers, integers, encoding in masked:
            encoding.decode_(integers, numbers, masks)
            if tensor.device != numbers.device:
                tensor.copy_(numbers)

    def _mask(
        self,
        tensors: Iterable[Tensor],
        seed: bytes,
        encoding_for: Callable[[torch.dtype], FixedPoint],
        masked: list[MaskedTensor],
    ) -> Iterator[Tensor]:
        """Yield the masked integers of each tensor, while previous ones are being sent."""
        nonce, self._num_sums = self._num_sums, self._num_sums + 1
        shared = {party: KeyStream(key, nonce) for party, key in self._keys.items()}
        added = [KeyStream(seed), *(mask for party, mask in shared.items() if party > self.party)]
        subtracted = [mask for party, mask in shared.items() if party < self.party]
        for tensor in tensors:
            encoding, numbers = encoding_for(tensor.dtype), tensor.detach().to("cpu")
            try:
                buffer = self._buffer_for(numbers, encoding, len(masked))
                integers = encoding.encode(numbers, buffer, added, subtracted)
            except OverflowError as error:
                raise self._too_large(error, encoding) from error
            masked.append(MaskedTensor(tensor, numbers, integers, encoding))
            yield integers

    def _buffer_for(self, tensor: Tensor, encoding: FixedPoint, index: int) -> Tensor | None:
        """Return the integer buffer of a tensor, reused between attempts; None if encoded in place.

        Allocating the size of a large adapter takes longer than encoding it.
        """
        if encoding.encodes_in_place(tensor):
            return None
        buffer = self._buffers.get(index)
        if buffer is None or buffer.dtype != encoding.dtype or len(buffer) < len(tensor):
            buffer = self._buffers[index] = torch.empty(len(tensor), dtype=encoding.dtype)
        return buffer[: len(tensor)]

    def _confirm(self) -> None:
        """Wait until every party holds the masked sum."""
        confirmed = torch.ones(1, dtype=torch.int64)
        self._federation.all_reduce_(confirmed)
        if int(confirmed) != self.num_parties:
            raise FederationError(
                f"Party {self.name} received {int(confirmed)} confirmations of {self.num_parties} parties."
                " Install the same version of pellm-lightning at all parties."
            )

    def _too_large(self, error: OverflowError, encoding: FixedPoint) -> FederationError:
        return FederationError(
            f"Party {self.name} would add {error.args[0]:.6g} (an update or a metric times its weight), but"
            f" in a secure sum of {self.num_parties} parties no value may exceed"
            f" {encoding.limit:.6g}, or their sum would overflow. Nothing of it was sent. At all parties, set"
            " a smaller fractional_bits (one bit less doubles the limit), bits=64 or weighting='uniform';"
            " or lower the learning rate if training diverges."
        )

    def _refused(self) -> FederationError:
        return FederationError(
            "Secure aggregation reveals sums only, no single party's values. Use Mean(), FrozenA(),"
            " Alternating(), ShareA() or LowRankMean(solver='power'), or exchange.Plain()."
        )
