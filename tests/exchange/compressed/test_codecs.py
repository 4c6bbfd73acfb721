"""Codes of numbers, read by arithmetic of its own: numpy in float64, from the bytes."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_oracles import random
from torch import Generator, Tensor

from pellm_lightning.exchange.compressed.codecs import Bfloat16Codec, Codec, QuantizationCodec, TopKCodec


def coded(codec: Codec, x: Tensor, seed: int = 0) -> tuple[bytes, Tensor]:
    """Return the code of a vector, piece by piece, and what it says."""
    data = torch.zeros(codec.size_bytes(len(x)), dtype=torch.uint8)
    out, generator = torch.empty_like(x), Generator().manual_seed(seed)
    for start in range(0, len(x), codec.piece):
        stop = min(start + codec.piece, len(x))
        part = data[codec.size_bytes(start) : codec.size_bytes(stop)]
        codec.encode_(x[start:stop], part, generator)
        codec.decode_(part, out[start:stop])
    return data.numpy().tobytes(), out


def read_blocks(data: bytes, bits: int, block: int, n: int) -> np.ndarray:
    """Read one piece: the steps of all blocks, then the codes; of 4 bits the second half lies above."""
    blocks = math.ceil(n / block)
    steps = np.array(struct.unpack(f"<{blocks}f", data[: 4 * blocks]))
    codes = np.frombuffer(data[4 * blocks :], np.int8)[: blocks * block * bits // 8].astype(np.int64)
    if bits == 4:
        codes = np.concatenate([(codes & 15) - 8, codes >> 4])
    return (codes.reshape(blocks, block) * steps[:, None]).reshape(-1)[:n]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 700),
    bits=st.sampled_from([8, 4]),
    block=st.sampled_from([8, 24, 128, 1000]),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e30]),
    seed=st.integers(0, 1000),
)
def test_blocks_miss_less_than_a_step(n: int, bits: int, block: int, scale: float, seed: int) -> None:
    x = random(seed, n, scale=scale)
    data, out = coded(QuantizationCodec(bits, block), x, seed)
    assert len(data) == math.ceil(math.ceil(n / block) * (4 + block * bits // 8) / 8) * 8
    said = read_blocks(data, bits, block, n)
    np.testing.assert_allclose(out.numpy(), said, rtol=1e-6, atol=0)
    largest = [float(part.abs().max()) for part in x.split(block)]
    steps = np.repeat(np.array(largest) / (2 ** (bits - 1) - 1), block)[:n]
    assert (np.abs(out.double().numpy() - x.double().numpy()) <= steps * (1 + 1e-5)).all()
    for part, decoded in zip(x.split(block), out.split(block), strict=True):  # the largest is met
        at = int(part.abs().argmax())
        assert float(decoded[at]) == pytest.approx(float(part[at]), rel=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_unbiased(bits: int) -> None:
    """A mean of 4000 codes is off by less than five of its standard deviations, half a step each at most."""
    x, draws = random(1, 128), 4000
    mean = sum(coded(QuantizationCodec(bits, 128), x, seed)[1].double() for seed in range(draws)) / draws
    step = float(x.abs().max()) / (2 ** (bits - 1) - 1)
    assert (mean - x).abs().max() < 5 * step / 2 / math.sqrt(draws)
    nearest = (x / step).round() * step
    assert (nearest - x).abs().max() > 0.4 * step, "else nothing is shown"


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    for bits in (8, 4):
        codec = QuantizationCodec(bits, 8)
        assert torch.equal(coded(codec, torch.zeros(20))[1], torch.zeros(20))
        for bad in (math.nan, math.inf, -math.inf):
            x = torch.ones(24)
            x[9] = bad
            out = coded(codec, x)[1]
            assert not torch.isfinite(out[8:16]).any()
            rest = torch.cat([out[:8], out[16:]])
            assert torch.isfinite(rest).all()
            if bits == 8:  # two codes of 4 bits share a byte
                torch.testing.assert_close(rest, torch.ones(16))


def test_vectors_of_several_pieces_and_odd_blocks() -> None:
    for codec in (
        QuantizationCodec(4, 24),
        QuantizationCodec(8, 128),
        QuantizationCodec(8, 32760),
        Bfloat16Codec(),
        TopKCodec(999, 17, 8),
    ):
        x = random(3, 2 * codec.piece + 12345)
        data, out = coded(codec, x)
        assert len(data) == codec.size_bytes(len(x))
        assert len(data) % 8 == 0
        ends = [codec.size_bytes(piece * codec.piece) for piece in (1, 2)]
        assert ends[1] == 2 * ends[0]
        assert ends[0] % 8 == 0
        assert (out - x).norm() < x.norm()


def test_casting_is_torchs_bfloat16() -> None:
    x = torch.cat([random(2, 999), random(3, 998, scale=1e-38), torch.tensor([3e38, 0.0])])
    assert torch.equal(coded(Bfloat16Codec(), x)[1], x.bfloat16().float())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 700),
    chunk=st.sampled_from([8, 13, 64, 333]),
    part=st.floats(0.01, 1.0),
    bits=st.sampled_from([8, 4]),
    seed=st.integers(0, 1000),
)
def test_the_largest_of_each_chunk_are_sent(n: int, chunk: int, part: float, bits: int, seed: int) -> None:
    k = max(1, int(part * chunk))
    x = random(seed, n)
    _, out = coded(TopKCodec(chunk, k, bits), x, seed)
    for values, said in zip(x.numpy().astype(float), out.numpy().astype(float), strict=True):
        assert said == 0 or abs(said - values) <= abs(x).max() / (2 ** (bits - 1) - 1) * (1 + 1e-5)
    for values, said in zip(x.split(chunk), out.split(chunk), strict=True):
        share = k if len(values) == chunk else math.ceil(k * len(values) / chunk)
        chosen = np.argsort(-np.abs(values.numpy()))[:share]
        assert set(np.flatnonzero(said.numpy())) <= set(chosen)
        assert float(said[chosen[0]]) == pytest.approx(float(values[chosen[0]]), rel=1e-5)


def test_sizes() -> None:
    for n in (1_000_000, 70_000):
        assert 1 <= QuantizationCodec(8, 128).size_bytes(n) / n <= 1.04
        assert 1 <= QuantizationCodec(4, 128).size_bytes(n) / (n / 2) <= 1.08
        assert Bfloat16Codec().size_bytes(n) == 2 * n
        # 64 of 4096: an index of 2 bytes, a value of 1, and 4 bytes for the scale.
        assert TopKCodec(4096, 64, 8).size_bytes(n) == pytest.approx(n / 4096 * (3 * 64 + 4), rel=0.01)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    for codec in (QuantizationCodec(8, 128), QuantizationCodec(4, 128), TopKCodec(64, 4, 4), Bfloat16Codec()):
        coded(codec, random(1, 1000))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_crosses_depends_on_the_seed_alone() -> None:
    x = random(5, 1000)
    assert (
        coded(QuantizationCodec(4, 128), x, 1)[0]
        == coded(QuantizationCodec(4, 128), x, 1)[0]
        != coded(QuantizationCodec(4, 128), x, 2)[0]
    )
