"""Digests of a tensor's bits by sums: whatever accident changes, moves or swaps is seen."""

import hashlib

import numpy as np
import pytest
import torch
from allocations import Allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pellm_lightning.tensors.digest import bits_digest

ROWS, COLUMNS = 128, 1024
BLOCK = 2 * ROWS * COLUMNS  # float32 values
SIZES = [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5]
FACTOR = 0x5851F42D4C957F2D


def values(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_the_digest_is_that_of_the_formula(size: int) -> None:
    """In Python's integers and numpy: row sums, column sums by Horner's rule over the blocks, the rest."""
    tensor = values(size)
    raw = tensor.numpy().tobytes()
    whole = len(raw) // (8 * ROWS * COLUMNS)
    blocks = np.frombuffer(raw[: whole * 8 * ROWS * COLUMNS], "<u8").reshape(whole, ROWS, COLUMNS)
    columns = [0] * COLUMNS
    for block in blocks:
        sums = block.sum(axis=0, dtype=np.uint64).tolist()
        columns = [(FACTOR * column + sum_) % 2**64 for column, sum_ in zip(columns, sums, strict=True)]
    expected = hashlib.sha256(raw[blocks.nbytes :])
    expected.update(blocks.sum(axis=2, dtype=np.uint64).tobytes())
    expected.update(np.array(columns, "<u8").tobytes())
    assert bits_digest(tensor) == expected.hexdigest()[:32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_neither_the_address_nor_strides_nor_threads_matter(dtype: torch.dtype, start: int) -> None:
    tensor = (values(2 * BLOCK + start + 9) * 9).to(dtype)[start:]
    alone = tensor.clone()
    assert bits_digest(tensor) == bits_digest(alone)
    spread = torch.stack([alone, alone], dim=1)[:, 0]
    assert bits_digest(spread) == bits_digest(alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert bits_digest(tensor) == bits_digest(alone)
    finally:
        torch.set_num_threads(threads)


@settings(deadline=None, max_examples=60)
@given(size=st.sampled_from(SIZES[1:]), data=st.data())
def test_every_bit_counts(size: int, data: st.DataObject) -> None:
    tensor = values(size)
    before = bits_digest(tensor)
    at, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 31))
    tensor.view(torch.int32)[at] ^= -(2**31) if bit == 31 else 1 << bit
    assert bits_digest(tensor) != before


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_whatever_is_swapped_is_seen(data: st.DataObject) -> None:
    """Single values, runs of them, rows, columns, blocks: of equal sums, since only the place differs."""
    tensor = values(3 * BLOCK + 100)
    before = bits_digest(tensor)
    length = data.draw(st.sampled_from([1, 2, 3, 64, COLUMNS, 2 * COLUMNS, 2 * COLUMNS + 2, BLOCK]))
    starts = st.integers(0, len(tensor) - length) | st.sampled_from([0, BLOCK, 2 * BLOCK, 2 * COLUMNS])
    one, other = data.draw(starts), data.draw(starts)
    if abs(one - other) < length:
        return
    kept = tensor[one : one + length].clone()
    tensor[one : one + length] = tensor[other : other + length]
    tensor[other : other + length] = kept
    assert bits_digest(tensor) != before


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5000), ulps=st.integers(1, 3))
def test_other_rounding_is_seen(seed: int, count: int, ulps: int) -> None:
    """A few values, or many, that differ in their last bits, up or down, as between two processors."""
    tensor = values(2 * BLOCK + 11)
    before = bits_digest(tensor)
    generator = torch.Generator().manual_seed(seed)
    where = torch.randperm(len(tensor), generator=generator)[:count]
    signs = torch.randint(0, 2, (count,), generator=generator, dtype=torch.int32) * 2 - 1
    tensor.view(torch.int32)[where] += ulps * signs
    assert bits_digest(tensor) != before


def test_a_shift_a_permutation_and_a_transposition_are_seen() -> None:
    tensor = values(2 * BLOCK)
    square = tensor[: 512 * 512].view(512, 512)
    others = [
        tensor.roll(1),
        tensor.roll(2 * COLUMNS),
        tensor.roll(BLOCK),
        tensor.flip(0),
        tensor.sort().values,
        tensor[torch.randperm(len(tensor), generator=torch.Generator().manual_seed(1))],
        torch.cat([square.T.flatten(), tensor[square.numel() :]]),
        tensor.view(-1, 2 * COLUMNS).flip(0).flatten(),
        tensor.view(-1, 2 * COLUMNS).flip(1).flatten(),
        torch.zeros(2 * BLOCK),
        -torch.zeros(2 * BLOCK),
        torch.zeros(2 * BLOCK - 1),
    ]
    digests = [bits_digest(other) for other in [tensor, *others]]
    assert len({*digests}) == len(digests)


def test_what_cancels_between_two_blocks_is_seen() -> None:
    tensor = values(2 * BLOCK)
    before = bits_digest(tensor)
    integers = tensor.view(torch.int64).view(2, ROWS, COLUMNS)
    integers[0, 3, 5] += 1
    integers[0, 3, 6] -= 1
    integers[1, 3, 5] -= 1
    integers[1, 3, 6] += 1
    assert bits_digest(tensor) != before


@pytest.mark.parametrize("start", [0, 1])
def test_no_tensor_is_copied_whole_even_where_it_is_unaligned(start: int) -> None:
    tensor = values(8 * BLOCK + 1)[start:]
    expected = bits_digest(tensor.clone())
    with Allocations() as made:
        assert bits_digest(tensor) == expected
    assert max(made.sizes) <= 4 * BLOCK
