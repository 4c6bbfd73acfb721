"""Samples of a party: views on tokenized records, without a copy of them, and padded batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

Sample = dict[str, Tensor]
"""``input_ids`` and ``labels``, each (T,) int64; a label of -100 is ignored by the loss."""

IGNORED = -100


class Samples(Dataset[Any]):
    """Sequence of a party's samples. ``a + b`` joins two, as of any torch data set.

    Args:
        length: Number of samples.
        longest: Tokens of the longest one.
    """

    def __init__(self, length: int, longest: int) -> None:
        self.length, self.longest = length, longest

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Return a sample, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        return self.sample(index % self.length)

    def __iter__(self) -> Iterator[Any]:
        return (self.sample(index) for index in range(self.length))

    def sample(self, index: int) -> Any:
        """Return a sample by its index from 0."""
        raise NotImplementedError


class RowSamples(Samples):
    """Samples that are the rows of a data set, as plain lists."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.lengths = _lengths(rows, "input_ids")
        super().__init__(len(rows), int(self.lengths.max(initial=0)))

    def sample(self, index: int) -> Any:
        """Return a row."""
        return self.rows[index]


class TextSamples(Samples):
    """Samples of language modelling: documents packed into blocks, then conversations, one each.

    Documents are concatenated with their special tokens; what is left at the end fills no block. A
    conversation is truncated to a block, and left out if nothing of it can be learned then.

    Args:
        tokens: Data set with ``input_ids`` and ``learned`` (N lists each), ``first``, the index of the first
            token that is learned in a conversation, and ``is_document``.
        block_size: Tokens of a block.
    """

    def __init__(self, tokens: Any, block_size: int) -> None:
        self.tokens, self.block_size = tokens, block_size
        is_document = tokens.data.column("is_document").to_numpy().astype(bool)
        lengths = _lengths(tokens, "input_ids")
        self.is_document, self.lengths = is_document, lengths
        self.stream = int(lengths[is_document].sum())
        self.blocks = self.stream // block_size
        self.starts = np.cumsum(np.where(is_document, lengths, 0))
        self.first = first = tokens.data.column("first").to_numpy().astype(np.int64)
        # The first token of a sample is never predicted.
        self.learnable = ~is_document & (first < np.minimum(lengths, block_size))
        self.singles = np.flatnonzero(self.learnable)
        longest = int(np.minimum(lengths[self.singles], block_size).max(initial=0))
        super().__init__(self.blocks + len(self.singles), max(longest, block_size if self.blocks else 0))

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all samples."""
        kept = np.minimum(self.lengths[self.singles], self.block_size).sum()
        return self.blocks * self.block_size + int(kept)

    def sample(self, index: int) -> Sample:
        """Return a block, or a conversation."""
        if index < self.blocks:
            block = torch.from_numpy(self._block(index * self.block_size))
            return {"input_ids": block, "labels": block}
        row = self.tokens[int(self.singles[index - self.blocks])]
        return text_sample(row["input_ids"], row["learned"], self.block_size)

    def _block(self, start: int) -> NDArray[np.int64]:
        """Return a block's tokens from the documents that it spans."""
        parts, needed = list[NDArray[Any]](), self.block_size
        row = int(np.searchsorted(self.starts, start, side="right"))
        while needed:
            if self.is_document[row]:
                begin = max(0, start - int(self.starts[row] - self.lengths[row]))
                part = self._values[row][begin : begin + needed]
                parts.append(part)
                needed -= len(part)
            row += 1
        return np.concatenate(parts).astype(np.int64)

    @cached_property
    def _values(self) -> "_Lists":
        return _Lists(self.tokens.data.column("input_ids").chunks)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without views into memory, which would be copied."""
        return {name: value for name, value in vars(self).items() if name != "_values"}


class _Lists:
    """Lists of an Arrow column as arrays that share its memory, which may be a mapped file's."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks = chunks
        self.starts = np.cumsum([0, *map(len, chunks)])

    def __getitem__(self, row: int) -> NDArray[Any]:
        chunk = int(np.searchsorted(self.starts, row, side="right")) - 1
        values: NDArray[Any] = self.chunks[chunk][row - int(self.starts[chunk])].values.to_numpy()
        return values


def _lengths(rows: Any, column: str) -> NDArray[np.int64]:
    import pyarrow.compute as pc

    lengths: NDArray[np.int64] = pc.list_value_length(rows.data.column(column)).to_numpy().astype(np.int64)
    return lengths


def text_sample(tokens: Sequence[int], learned: Sequence[bool], block_size: int) -> Sample:
    """Return a conversation truncated to ``block_size`` tokens; what is not learned has no label."""
    ids = torch.tensor(tokens[:block_size], dtype=torch.int64)
    labels = ids.masked_fill(~torch.tensor(learned[:block_size], dtype=torch.bool), IGNORED)
    return {"input_ids": ids, "labels": labels}


def stream_samples(
    encoded: Iterable[tuple[Sequence[int], Sequence[bool], bool]], block_size: int
) -> Iterator[Sample]:
    """Yield samples of tokenized records as they come: blocks of documents, and conversations between."""
    carried: list[int] = []
    for tokens, learned, is_document in encoded:
        if is_document:
            carried.extend(tokens)
            whole = len(carried) // block_size * block_size
            for start in range(0, whole, block_size):
                block = torch.tensor(carried[start : start + block_size], dtype=torch.int64)
                yield {"input_ids": block, "labels": block}
            del carried[:whole]
        elif any(learned[1:block_size]):
            yield text_sample(tokens, learned, block_size)


@dataclass(frozen=True)
class Padding:
    """Collate function that pads samples to the longest: ``input_ids``, ``attention_mask``, ``labels``.

    Args:
        pad: The padding token.
        side: Where it is put.
    """

    pad: int
    side: Literal["left", "right"] = "right"

    def __call__(self, samples: Sequence[Mapping[str, Tensor]]) -> Sample:
        """Return tensors, (B, T) int64; ``labels`` if the samples have them."""
        filling = {"input_ids": self.pad, "attention_mask": 0, "labels": IGNORED}
        whole = [{**sample, "attention_mask": torch.ones_like(sample["input_ids"])} for sample in samples]
        return {
            key: pad_sequence([sample[key] for sample in whole], True, value, padding_side=self.side)
            for key, value in filling.items()
            if key in whole[0]
        }
