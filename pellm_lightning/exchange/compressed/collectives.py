"""Compressed all-reduce with error feedback: only codes are sent, their errors go into the next round."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor
from typing_extensions import override

from pellm_lightning.comm import Collectives
from pellm_lightning.comm.collectives import staged
from pellm_lightning.exchange.compressed.codecs import Codec
from pellm_lightning.exchange.delegation import DelegatingCollectives
from pellm_lightning.exchange.error_feedback import ErrorFeedback


class CompressedCollectives(DelegatingCollectives):
    """Compressed collectives of one attempt; subclasses define how a bucket is summed.

    ``all_reduce_each_`` encodes the buckets of the round's vector; a bucket's offset there identifies its
    residuals. All other tensors, and all that ``all_reduce_`` sums, are exact. Gathered float32 is encoded
    without residuals, and every party continues with the decoded values, its own included.

    Args:
        federation: Collectives of the attempt's members.
        codec: The codec of float32 values.
        error_feedback: This party's residuals.
        seed: Seed of the stochastic rounding.
    """

    lossy = True

    def __init__(
        self, federation: Collectives, codec: Codec, error_feedback: ErrorFeedback, seed: int
    ) -> None:
        super().__init__(federation)
        self._codec = codec
        self._error_feedback = error_feedback
        self._seed = seed
        self._scratch = [torch.empty(codec.piece) for _ in range(2)]

    # ---- tensors

    @override
    def all_reduce_(self, x: Tensor) -> Tensor:
        return self._federation.all_reduce_(x)

    @override
    def all_reduce_each_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            offset = self._error_feedback.offset(tensor)
            if offset is None:
                self._federation.all_reduce_(tensor)
            elif not any(self._error_feedback.participating):
                tensor.zero_()  # nothing is sent, and the residuals stay
            elif tensor.numel():
                with staged(tensor) as on_cpu:
                    (self._sum_ if self.num_parties > 1 else self._add_residual_)(on_cpu, offset)

    @override
    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        if parts[0].dtype != torch.float32:
            return self._federation.all_to_all(parts, sizes)
        generator = self._generator("parts", self._next_gather())
        sent = [self._encoded(part, generator) for part in parts]
        received = self._federation.all_to_all(sent, [self._codec.size_bytes(size) for size in sizes])
        return [self._decoded(data, size) for data, size in zip(received, sizes, strict=True)]

    @override
    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        if x.dtype != torch.float32:
            return self._federation.all_gather(x, sizes)
        mine = self._encoded(x, self._generator("whole", self._next_gather()))
        received = self._federation.all_gather(mine, [self._codec.size_bytes(size) for size in sizes])
        return [self._decoded(data, size) for data, size in zip(received, sizes, strict=True)]

    # ---- the round's vector

    @abstractmethod
    def _sum_(self, x: Tensor, offset: int) -> None:
        """All-reduce a bucket, flat float32 on the CPU at an offset in the vector, in place."""

    def _add_residual_(self, x: Tensor, offset: int) -> None:
        """Sum over a single party: nothing is sent, and the whole residual is repaid."""
        end = offset + len(x)
        residual = self._error_feedback.residual(offset, end)
        next_residual = self._error_feedback.next_residual(offset, end)
        if residual is not None and next_residual is not None:
            x.add_(residual)
            next_residual.zero_()

    def _encode(
        self, x: Tensor, offset: int, data: Tensor, generator: Generator, *, add_residual: bool = True
    ) -> None:
        """Encode a range of the vector plus its residual, and keep the error as the next residual.

        Args:
            x: The values of the range.
            offset: Its offset in the vector.
            data: Output buffer of the code.
            generator: For the stochastic rounding.
            add_residual: Whether to add the residual; a sum contains it already.
        """
        end = offset + len(x)
        residual = self._error_feedback.residual(offset, end) if add_residual else None
        next_residual = self._error_feedback.next_residual(offset, end)
        for values, places in self._pieces(x):
            exact, decoded = values, self._scratch[0][: len(values)]
            if residual is not None:
                exact = torch.add(values, residual[places], out=self._scratch[1][: len(values)])
            self._codec.encode_(exact, data[self._bytes(places)], generator)
            self._codec.decode_(data[self._bytes(places)], decoded)
            error = torch.sub(exact, decoded, out=decoded)
            self._error_feedback.record_error(error, exact)
            if next_residual is not None:
                next_residual[places].copy_(error)

    def _decode_(self, data: Tensor, x: Tensor) -> None:
        for values, places in self._pieces(x):
            self._codec.decode_(data[self._bytes(places)], values)

    # ---- gathered factors

    def _encoded(self, x: Tensor, generator: Generator) -> Tensor:
        values = x.detach().to("cpu").contiguous()
        data = torch.zeros(self._codec.size_bytes(len(values)), dtype=torch.uint8)
        for piece, places in self._pieces(values):
            self._codec.encode_(piece, data[self._bytes(places)], generator)
        return data

    def _decoded(self, data: Tensor, size: int) -> Tensor:
        values = torch.empty(size)
        self._decode_(data, values)
        return values

    def _next_gather(self) -> int:
        self._error_feedback.num_gathers += 1
        return self._error_feedback.num_gathers

    # ---- helpers

    def _pieces(self, x: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Yield the codec's pieces of ``x`` and their slices."""
        for start in range(0, len(x), self._codec.piece):
            places = slice(start, min(start + self._codec.piece, len(x)))
            yield x[places], places

    def _bytes(self, places: slice) -> slice:
        """Return the slice of a piece's code."""
        return slice(self._codec.size_bytes(places.start), self._codec.size_bytes(places.stop))

    def _generator(self, purpose: str, number: int) -> Generator:
        """Return this party's generator for one purpose in one round: a resumed run draws the same."""
        place, _ = self.place
        key = f"{self._seed} {self._error_feedback.round} {place} {purpose} {number}"
        digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
        return Generator().manual_seed(int.from_bytes(digest, "big"))


class DenseCollectives(CompressedCollectives):
    """Compressed all-reduce by a reduce-scatter and an all-gather: each party sums one slice of a bucket.

    It does so in float32 and in the order of the parties. The compression error of a sum is kept by the party
    that summed it, at the same offset as the errors of its updates. So if the members change, and the slices
    with them, each error exists exactly once and is sent to the slice's new owner.
    """

    @override
    def _sum_(self, x: Tensor, offset: int) -> None:
        codec, feedback, own_party = self._codec, self._error_feedback, self.party
        length = _slice(len(x), self.num_parties, codec.block)
        ends = [min(party * length, len(x)) for party in range(self.num_parties + 1)]
        slices = [slice(start, stop) for start, stop in pairwise(ends)]
        generator = self._generator("updates", offset)
        sent = []
        for party, place in enumerate(slices):
            sends = feedback.participating[own_party] and party != own_party
            data = feedback.buffer(f"to {party}", codec.size_bytes(place.stop - place.start) if sends else 0)
            if sends:
                self._encode(x[place], offset + place.start, data, generator)
            sent.append(data)
        own = slices[own_party]
        size = codec.size_bytes(own.stop - own.start)
        sizes = [
            size if participates and party != own_party else 0
            for party, participates in enumerate(feedback.participating)
        ]
        received = self._federation.all_to_all(sent, sizes)
        self._reduce_slice_(x[own], offset + own.start, received)
        code = feedback.buffer("sum", codec.size_bytes(length))
        generator = self._generator("sums", offset)
        self._encode(x[own], offset + own.start, code[:size], generator, add_residual=False)
        code[size:].zero_()  # all parties send the same size
        sums = self._federation.all_gather(code, [len(code)] * self.num_parties)
        for place, data in zip(slices, sums, strict=True):
            self._decode_(data, x[place])

    def _reduce_slice_(self, x: Tensor, offset: int, received: Sequence[Tensor]) -> None:
        """Sum all parties' values of this party's slice, and its residual, in place."""
        decoded, total = self._scratch
        residual = self._error_feedback.residual(offset, offset + len(x))
        for values, places in self._pieces(x):
            sum_ = total[: len(values)].zero_()
            for party, data in enumerate(received):
                if party == self.party:
                    sum_.add_(values)  # own values are not sent, so they are exact
                    if residual is not None:
                        sum_.add_(residual[places])
                elif len(data):
                    part = decoded[: len(values)]
                    self._codec.decode_(data[self._bytes(places)], part)
                    sum_.add_(part)
            values.copy_(sum_)


class SparseCollectives(CompressedCollectives):
    """Sparse all-reduce: an all-gather of all parties' codes, which every party sums in their order."""

    @override
    def _sum_(self, x: Tensor, offset: int) -> None:
        participating = self._error_feedback.participating
        size = self._codec.size_bytes(len(x))
        sizes = [size if participates else 0 for participates in participating]
        data = self._error_feedback.buffer("sent", sizes[self.party])
        if participating[self.party]:
            self._encode(x, offset, data, self._generator("updates", offset))
        codes = self._federation.all_gather(data, sizes)
        for values, places in self._pieces(x.zero_()):
            decoded = self._scratch[0][: len(values)]
            for code in filter(len, codes):
                self._codec.decode_(code[self._bytes(places)], decoded)
                values.add_(decoded)


def _slice(size: int, parties: int, block: int) -> int:
    """Return the length of each party's slice: whole blocks, but for the last of the vector."""
    blocks = -(-size // block)
    return -(-blocks // parties) * block
