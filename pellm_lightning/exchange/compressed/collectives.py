"""Sums over the parties of which only codes cross, and residuals that the next round pays."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor
from typing_extensions import override

from pellm_lightning.comm import Collectives
from pellm_lightning.exchange.compressed.codecs import Codec
from pellm_lightning.exchange.delegation import DelegatingCollectives
from pellm_lightning.exchange.error_feedback import ErrorFeedback


class CompressedCollectives(DelegatingCollectives):
    """The sums of one attempt; how a bucket is summed is up to those below.

    ``all_reduce_each_`` sums the vector of a round: its buckets are encoded. All else is exact, and so is
    what ``all_reduce_`` sums. Where a bucket lies in the vector tells which residuals are its own. What is
    gathered in float32 is encoded, too, without residuals, and every party goes on with what the others
    decode, its own included.

    Args:
        federation: The parties that meet.
        codec: How numbers become bytes.
        error_feedback: What this party keeps from round to round.
        seed: Of the stochastic rounding.
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
            at = self._error_feedback.place(tensor)
            if at is None:
                self._federation.all_reduce_(tensor)
            elif not any(self._error_feedback.counting):
                tensor.zero_()  # nobody says anything, and what is owed stays owed
            elif tensor.numel():
                on_cpu = tensor.detach().to("cpu")
                (self._sum_ if self.num_parties > 1 else self._keep_)(on_cpu, at)
                if on_cpu.data_ptr() != tensor.data_ptr():
                    tensor.copy_(on_cpu)

    @override
    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        if parts[0].dtype != torch.float32:
            return self._federation.all_to_all(parts, sizes)
        generator = self._drawing("parts", self._next_leg())
        sent = [self._encoded(part, generator) for part in parts]
        received = self._federation.all_to_all(sent, [self._codec.size_bytes(size) for size in sizes])
        return [self._decoded(data, size) for data, size in zip(received, sizes, strict=True)]

    @override
    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        if x.dtype != torch.float32:
            return self._federation.all_gather(x, sizes)
        mine = self._encoded(x, self._drawing("whole", self._next_leg()))
        received = self._federation.all_gather(mine, [self._codec.size_bytes(size) for size in sizes])
        return [self._decoded(data, size) for data, size in zip(received, sizes, strict=True)]

    # ---- the vector

    @abstractmethod
    def _sum_(self, x: Tensor, at: int) -> None:
        """Sum a bucket, flat float32 on the CPU, that begins at ``at`` in the vector, in place."""

    def _keep_(self, x: Tensor, at: int) -> None:
        """Sum over a single party: nothing crosses, and all that is owed is paid."""
        owed, lost = self._error_feedback.owed(at, at + len(x)), self._error_feedback.lost(at, at + len(x))
        if owed is not None and lost is not None:
            x.add_(owed)
            lost.zero_()

    def _encode(self, x: Tensor, at: int, data: Tensor, generator: Generator, *, adds: bool = True) -> None:
        """Encode a part of the vector, with what is owed there; note what is lost.

        Args:
            x: The part.
            at: Where it begins in the vector.
            data: Where its code goes.
            generator: For the rounding.
            adds: Whether what is owed is to be added; in a sum it is already.
        """
        owed = self._error_feedback.owed(at, at + len(x)) if adds else None
        kept = self._error_feedback.lost(at, at + len(x))
        for values, places in self._pieces(x):
            wanted, decoded = values, self._scratch[0][: len(values)]
            if owed is not None:
                wanted = torch.add(values, owed[places], out=self._scratch[1][: len(values)])
            self._codec.encode_(wanted, data[self._bytes(places)], generator)
            self._codec.decode_(data[self._bytes(places)], decoded)
            lost = torch.sub(wanted, decoded, out=decoded)
            self._error_feedback.note(lost, wanted)
            if kept is not None:
                kept[places].copy_(lost)

    def _decode_(self, data: Tensor, x: Tensor) -> None:
        for values, places in self._pieces(x):
            self._codec.decode_(data[self._bytes(places)], values)

    # ---- what rules gather

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

    def _next_leg(self) -> int:
        self._error_feedback.legs += 1
        return self._error_feedback.legs

    # ---- small parts

    def _pieces(self, x: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Yield the pieces that are encoded at a time, and where they are in ``x``."""
        for start in range(0, len(x), self._codec.piece):
            places = slice(start, min(start + self._codec.piece, len(x)))
            yield x[places], places

    def _bytes(self, places: slice) -> slice:
        """Return where the code of a piece lies."""
        return slice(self._codec.size_bytes(places.start), self._codec.size_bytes(places.stop))

    def _drawing(self, leg: str, number: int) -> Generator:
        """Return a generator of this party's own, for one purpose in one round: a resumed run draws alike."""
        place, _ = self.place
        words = f"{self._seed} {self._error_feedback.round} {place} {leg} {number}"
        digest = hashlib.blake2b(words.encode(), digest_size=4).digest()
        return Generator().manual_seed(int.from_bytes(digest, "big"))


class DenseCollectives(CompressedCollectives):
    """Sums by a reduce-scatter and an all-gather, both encoded: each party adds up a slice of each bucket.

    It does so in float32 and in the order of the parties. What the code of a sum loses is a residual of the
    party that added it up, in the same place as those of its updates. So if members change and with them the
    slices, all of it is still there, once, and is sent to whoever owns the slice then.
    """

    @override
    def _sum_(self, x: Tensor, at: int) -> None:
        codec, error_feedback, here = self._codec, self._error_feedback, self.party
        length = _slice(len(x), self.num_parties, codec.block)
        ends = [min(party * length, len(x)) for party in range(self.num_parties + 1)]
        slices = [slice(start, stop) for start, stop in pairwise(ends)]
        generator = self._drawing("updates", at)
        sent = []
        for party, place in enumerate(slices):
            said = error_feedback.counting[here] and party != here
            data = error_feedback.buffer(
                f"to {party}", codec.size_bytes(place.stop - place.start) if said else 0
            )
            if said:
                self._encode(x[place], at + place.start, data, generator)
            sent.append(data)
        own = slices[here]
        size = codec.size_bytes(own.stop - own.start)
        sizes = [
            size if counts and party != here else 0 for party, counts in enumerate(error_feedback.counting)
        ]
        received = self._federation.all_to_all(sent, sizes)
        self._add_up_(x[own], at + own.start, received)
        mine = error_feedback.buffer("sum", codec.size_bytes(length))
        self._encode(x[own], at + own.start, mine[:size], self._drawing("sums", at), adds=False)
        mine[size:].zero_()  # what all send has the same size
        sums = self._federation.all_gather(mine, [len(mine)] * self.num_parties)
        for place, data in zip(slices, sums, strict=True):
            self._decode_(data, x[place])

    def _add_up_(self, x: Tensor, at: int, received: Sequence[Tensor]) -> None:
        """Add what all say of the slice that this party owns, and what is owed there, in place."""
        error_feedback, (decoded, total) = self._error_feedback, self._scratch
        owed = error_feedback.owed(at, at + len(x))
        for values, places in self._pieces(x):
            sum_ = total[: len(values)].zero_()
            for party, data in enumerate(received):
                if party == self.party:
                    sum_.add_(values)  # it does not cross, so nothing of it is lost
                    if owed is not None:
                        sum_.add_(owed[places])
                elif len(data):
                    part = decoded[: len(values)]
                    self._codec.decode_(data[self._bytes(places)], part)
                    sum_.add_(part)
            values.copy_(sum_)


class SparseCollectives(CompressedCollectives):
    """Sums of few numbers of each party: all get all of them, and add them up in the order of the parties."""

    @override
    def _sum_(self, x: Tensor, at: int) -> None:
        error_feedback, counts = self._error_feedback, self._error_feedback.counting[self.party]
        size = self._codec.size_bytes(len(x))
        data = error_feedback.buffer("said", size if counts else 0)
        if counts:
            self._encode(x, at, data, self._drawing("updates", at))
        said = self._federation.all_gather(
            data, [size if counts else 0 for counts in error_feedback.counting]
        )
        for values, places in self._pieces(x.zero_()):
            decoded = self._scratch[0][: len(values)]
            for of_party in filter(len, said):
                self._codec.decode_(of_party[self._bytes(places)], decoded)
                values.add_(decoded)


def _slice(size: int, parties: int, block: int) -> int:
    """Return the length of the slices that the parties own: whole blocks, but for the vector's last."""
    blocks = -(-size // block)
    return -(-blocks // parties) * block
