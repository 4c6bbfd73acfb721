"""Sums that reveal nothing but themselves.

A party's numbers become integers of a ring (``ring.py``) and get masks of two kinds before they leave it.
With each other party it shares one that this party adds and the other subtracts: in the sum they cancel. A
mask of its own stays in the sum until every party has confirmed that it holds that sum; only then all reveal
the keys of these. The protocol is the one of Bonawitz et al. 2017 (CCS, doi:10.1145/3133956.3133982) without
its recovery of lost parties: here whoever is lost breaks the attempt, which is made again without it.
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

# Rules sum what is scaled by the parties' shares, and small: there is room for more digits.
_FINE_BITS = 40

# What the attempts of a federation have used for integers, by the index of the tensor in its sum.
_error_feedback: WeakKeyDictionary[Collectives, dict[int, Tensor]] = WeakKeyDictionary()


class Held(NamedTuple):
    """One tensor of a sum that is not readable yet."""

    tensor: Tensor
    numbers: Tensor
    """The tensor, or if that lies on another device a copy of it on the CPU."""
    integers: Tensor
    """Its masked integers, then their sum; maybe in the memory of the numbers."""
    ring: FixedPoint


class SecAggCollectives(DelegatingCollectives):
    """The sums of one attempt. Nothing else of a party's values crosses: gathering them is refused.

    ``all_reduce_each_`` sums the vector of a round: float32 as ``SecureAggregation`` says, all else with 64 bits.
    ``all_reduce_`` sums what a rule computed, of the order of one, with 64 bits and 40 of them fractional.

    Args:
        federation: The parties that meet.
        keys: The key that this party shares with each other one, by its index; used for this object only.
        bits: Of the ring for float32.
        fractional_bits: Of the ring for float32.
        revealing: Called before this party reveals the key of its own mask.
    """

    def __init__(
        self,
        federation: Collectives,
        keys: Mapping[int, bytes],
        bits: int,
        fractional_bits: int,
        revealing: Callable[[], None],
    ) -> None:
        super().__init__(federation)
        self._keys = keys
        self._ring = FixedPoint(bits, fractional_bits, federation.num_parties)
        self._wide = FixedPoint(64, min(fractional_bits, 32), federation.num_parties)
        self._fine = FixedPoint(64, _FINE_BITS, federation.num_parties)
        self._revealing = revealing
        self._sums = 0
        self._error_feedback = _error_feedback.setdefault(federation, {})

    # ---- tensors

    @override
    def all_reduce_(self, x: Tensor) -> Tensor:
        flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
        self._sum_each_([flat], lambda dtype: self._fine)
        return x if x.is_contiguous() else x.copy_(flat.view_as(x))

    @override
    def all_reduce_each_(self, tensors: Iterable[Tensor]) -> None:
        self._sum_each_(tensors, lambda dtype: self._ring if dtype == torch.float32 else self._wide)

    @override
    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        raise self._refused()

    @override
    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        raise self._refused()

    # ---- the protocol

    def _sum_each_(self, tensors: Iterable[Tensor], ring_of: Callable[[torch.dtype], FixedPoint]) -> None:
        own = secrets.token_bytes(KEY_BYTES)
        held: list[Held] = []
        self._federation.all_reduce_each_(self._masked(tensors, own, ring_of, held))
        self._confirm()
        self._revealing()
        masks = [KeyStream(key) for key in key_agreement.tell(self._federation, own, KEY_BYTES)]
        for of in held:
            of.ring.decode_(of.integers, of.numbers, masks)
            if of.tensor.device != of.numbers.device:
                of.tensor.copy_(of.numbers)

    def _masked(
        self,
        tensors: Iterable[Tensor],
        own: bytes,
        ring_of: Callable[[torch.dtype], FixedPoint],
        held: list[Held],
    ) -> Iterator[Tensor]:
        """Yield what leaves this party, one tensor after the other, while the last ones cross."""
        number, self._sums = self._sums, self._sums + 1
        shared = {party: KeyStream(key, number) for party, key in self._keys.items()}
        added = [KeyStream(own), *(mask for party, mask in shared.items() if party > self.party)]
        subtracted = [mask for party, mask in shared.items() if party < self.party]
        for tensor in tensors:
            ring, numbers = ring_of(tensor.dtype), tensor.detach().to("cpu")
            try:
                error_feedback = self._memory_for(numbers, ring, len(held))
                integers = ring.encode(numbers, error_feedback, added, subtracted)
            except OverflowError as error:
                raise self._too_large(error, ring) from error
            held.append(Held(tensor, numbers, integers, ring))
            yield integers

    def _memory_for(self, tensor: Tensor, ring: FixedPoint, index: int) -> Tensor | None:
        """Return the memory in which the last attempt has put the integers of a tensor, if it is enough.

        New memory of the size of a large adapter costs more time than all that is computed there.
        """
        if ring.encodes_in_place(tensor):
            return None
        kept = self._error_feedback.get(index)
        if kept is None or kept.dtype != ring.dtype or len(kept) < len(tensor):
            kept = self._error_feedback[index] = torch.empty(len(tensor), dtype=ring.dtype)
        return kept[: len(tensor)]

    def _confirm(self) -> None:
        """Return when every party holds the masked sum."""
        confirmed = torch.ones(1, dtype=torch.int64)
        self._federation.all_reduce_(confirmed)
        if int(confirmed) != self.num_parties:
            raise FederationError(
                f"Party {self.name} heard {int(confirmed)} confirmations of {self.num_parties} parties."
                " Install the same version of pellm-lightning at all parties."
            )

    def _too_large(self, error: OverflowError, ring: FixedPoint) -> FederationError:
        return FederationError(
            f"Party {self.name} would add {error.args[0]:.6g} (an update times the party's weight, or a"
            f" metric times its), but of {self.num_parties} parties' masked values none may exceed"
            f" {ring.limit:.6g}, or their sum would wrap around. Nothing of it was sent. At all parties, set"
            " a smaller fractional_bits (each bit less doubles the limit), bits=64 or weighting='uniform';"
            " or lower the learning rate if training diverges."
        )

    def _refused(self) -> FederationError:
        return FederationError(
            "A masked exchange gives sums only, no party's own values. Use Mean(), FrozenA(), Alternating(),"
            " ShareA() or LowRankMean(solver='power'), or exchange.Plain()."
        )
