"""Digests of whole tensors: every value and its place count, nothing else does."""

import struct
import subprocess
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pellm_lightning.tensors.digest import TensorDigest, differing_rows, row_bounds, tensor_digest

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
]


def bits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A tensor of random bits, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = torch.empty(0, dtype=dtype).element_size()
    drawn = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=generator)
    return drawn.view(dtype)


def values(tensor: Tensor) -> str:
    return tensor_digest(tensor).values


# ---- equal tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 5), (4099, 3), (1, 70001)])
def test_equal_tensors_have_equal_digests(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = bits(*shape, dtype=dtype)
    assert tensor_digest(tensor) == tensor_digest(tensor.clone()) == tensor_digest(torch.nn.Parameter(
        tensor.clone(), requires_grad=False))  # fmt: skip


@pytest.mark.parametrize(
    "tensor", [torch.tensor(1.5), torch.zeros(0), torch.zeros(3, 0), torch.zeros(0, 3), torch.tensor(True)]
)
def test_a_digest_of_little_or_nothing(tensor: Tensor) -> None:
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
    st.randoms(use_true_random=False),
)
def test_neither_strides_nor_the_address_matter(
    shape: list[int], dtype: torch.dtype, seed: int, random: Any
) -> None:
    tensor = bits(*shape, dtype=dtype, seed=seed)
    order = list(range(len(shape)))
    random.shuffle(order)
    back = [order.index(dim) for dim in range(len(shape))]
    strided = tensor.permute(order).contiguous().permute(back)
    shifted = torch.cat([tensor.new_zeros(3), tensor.flatten()])[3:].view(shape)
    assert torch.equal(strided.contiguous().view(torch.uint8), tensor.view(torch.uint8))
    assert tensor_digest(tensor) == tensor_digest(strided) == tensor_digest(shifted)


@pytest.mark.parametrize("shape", [(5000, 7), (3, 40000), (130, 4097), (2, 3, 40000)])
def test_a_large_tensor_may_have_any_strides(shape: tuple[int, ...]) -> None:
    tensor = bits(*shape)
    assert tensor_digest(tensor) == tensor_digest(tensor.transpose(0, -1).contiguous().transpose(0, -1))


def test_a_conjugate_is_what_it_stands_for() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert tensor_digest(tensor.conj()) == tensor_digest(tensor.conj().resolve_conj())
    assert values(tensor.conj()) != values(tensor)


def test_shape_and_dtype_are_part_of_a_digest() -> None:
    zeros = torch.zeros(2, 3)
    others = [zeros.t(), zeros.reshape(6), zeros.to(torch.bfloat16), zeros.double(), torch.zeros(2, 3, 1)]
    assert len({str(tensor_digest(tensor)) for tensor in [zeros, *others]}) == 6


def test_on_the_meta_device_the_shape_is_all() -> None:
    digest = tensor_digest(torch.empty(3, 4, device="meta"))
    assert digest == tensor_digest(torch.empty(3, 4, device="meta"))
    assert digest != tensor_digest(torch.empty(4, 3, device="meta"))


def test_the_digest_is_that_of_the_formula() -> None:
    # Carried out by Python's integers: sums of 32-bit words times odd weights, modulo 2^64, then hashed.
    import hashlib

    tensor = bits(5000)
    drawn = hashlib.shake_128(b"pellm_lightning.tensors.digest").digest(8 * 4096)
    weights = [number | 1 for number in struct.unpack("<4096q", drawn)]
    words = struct.unpack("<5000i", tensor.view(torch.uint8).numpy().tobytes())
    sums = [
        sum(weight * word for weight, word in zip(weights, words[start : start + 4096], strict=False)) % 2**64
        for start in (0, 4096)
    ]
    hashed = hashlib.blake2b(b"20000" + struct.pack("<2Q", *sums), digest_size=8)
    assert values(tensor) == hashed.hexdigest()


@pytest.mark.parametrize(
    "variables", [{"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"}, {"OMP_NUM_THREADS": "3"}]
)
def test_neither_the_processor_nor_its_threads_matter(variables: dict[str, str]) -> None:
    code = (
        "import torch; from pellm_lightning.tensors.digest import tensor_digest\n"
        "print(tensor_digest((torch.arange(300000) * 7919 % 65521).to(torch.int16).view(-1, 30)))"
    )
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    ours = tensor_digest((torch.arange(300000) * 7919 % 65521).to(torch.int16).view(-1, 30))
    assert done.stdout.strip() == str(ours)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_agrees_with_a_cpu(dtype: torch.dtype) -> None:
    for shape in [(3, 5), (5000, 33), (300, 70001)]:
        tensor = bits(*shape, dtype=dtype)
        assert tensor_digest(tensor) == tensor_digest(tensor.cuda())


# ---- tensors that differ


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([(40,), (7, 6), (300, 3), (3, 4, 5), (2, 9000), (9000, 2)]),
    st.sampled_from([dtype for dtype in DTYPES if dtype != torch.bool]),
    st.data(),
)
def test_every_bit_counts(shape: tuple[int, ...], dtype: torch.dtype, data: Any) -> None:
    tensor = bits(*shape, dtype=dtype)
    other = tensor.clone()
    flat = other.view(-1).view(torch.uint8)
    at = data.draw(st.integers(0, flat.numel() - 1))
    flat[at] ^= 1 << data.draw(st.integers(0, 7))
    assert values(other) != values(tensor)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from([(40, 3), (7, 600), (3000, 5)]), st.sampled_from(DTYPES), st.data())
def test_swapped_rows_are_seen(shape: tuple[int, int], dtype: torch.dtype, data: Any) -> None:
    tensor = bits(*shape, dtype=dtype)
    one, other = (data.draw(st.integers(0, shape[0] - 1)) for _ in range(2))
    swapped = tensor.clone()
    swapped[one], swapped[other] = tensor[other].clone(), tensor[one].clone()
    same = torch.equal(swapped.view(torch.uint8), tensor.view(torch.uint8))
    assert (values(swapped) == values(tensor)) == same


@settings(deadline=None, max_examples=100)
@given(
    st.integers(2, 40).flatmap(lambda size: st.permutations(range(size))),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
def test_permuted_values_are_seen(order: list[int], dtype: torch.dtype, seed: int) -> None:
    tensor = bits(len(order), dtype=dtype, seed=seed)
    # As bytes: older torch indexes no 8-bit floats.
    permuted = tensor.view(torch.uint8).view(len(order), -1)[order].view(-1).view(dtype)
    same = torch.equal(permuted.view(torch.uint8), tensor.view(torch.uint8))
    assert (values(permuted) == values(tensor)) == same


def test_signs_count_wherever_they_stand() -> None:
    # Numbers that differ in their highest bit only are the weak point of products modulo a power of two.
    ones = torch.ones(5000)
    seen = {values(ones), values(-ones)}
    for at in range(0, 5000, 7):
        for other in (at + 1, at + 2, at + 4096):
            tensor = ones.clone()
            tensor[[at, other % 5000]] = -1.0
            seen.add(values(tensor))
    assert len(seen) == 2 + 3 * len(range(0, 5000, 7))


def test_values_moved_by_whole_segments_are_seen() -> None:
    tensor = bits(4 * 4096)
    rolled = {values(tensor.roll(shift * 4096)) for shift in range(4)}
    assert len(rolled) == 4


# ---- which rows


@given(st.integers(0, 300_000), st.integers(1, 5000))
def test_blocks_cover_all_rows_and_are_few(rows: int, columns: int) -> None:
    bounds = row_bounds((rows, columns))
    assert (bounds[0], bounds[-1]) == (0, rows)
    assert bounds == sorted(bounds)
    assert len(bounds) < 90


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 10, 16])
def test_rows_that_were_added_at_the_end_are_found(rows: int) -> None:
    tensor = bits(1000, 8)
    other = tensor.clone()
    other[1000 - rows :] = bits(rows, 8, seed=1)
    ours, theirs = tensor_digest(tensor), tensor_digest(other)
    assert differing_rows(ours.shape, ours.blocks, theirs.blocks) == [range(1000 - rows, 1000)]


def test_a_row_somewhere_is_found_within_a_quarter_of_its_distance_from_the_end() -> None:
    tensor = bits(1000, 8)
    for row in (0, 1, 500, 980, 995):
        other = tensor.clone()
        other[row] += 1
        other[row, 0] = 7.0
        ours, theirs = tensor_digest(tensor), tensor_digest(other)
        (found,) = differing_rows(ours.shape, ours.blocks, theirs.blocks)
        assert row in found
        assert len(found) <= max(1, (1000 - found.start) / 4)


@pytest.mark.parametrize("tensor", [bits(1000, 8), bits(3, 4), torch.tensor(1.0), torch.zeros(0)])
def test_a_digest_is_text(tensor: Tensor) -> None:
    digest = tensor_digest(tensor)
    assert TensorDigest.parse(str(digest)) == digest
    assert digest.shape == list(tensor.shape)


def test_other_text_is_taken_as_values() -> None:
    assert TensorDigest.parse("01").values == "01"
