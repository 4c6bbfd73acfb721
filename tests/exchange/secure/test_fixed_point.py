"""Fixed-point numbers in a ring, and the streams that mask them."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellm_lightning.exchange.secure import fixed_point
from pellm_lightning.exchange.secure.fixed_point import FixedPoint, KeyStream

I64 = torch.int64


KEY = bytes(16)


def stream(key: bytes, nonce: int, size: int) -> bytes:
    block = np.empty(size // 4, np.int32)
    KeyStream(key, nonce).write(block)
    return block.tobytes()


def test_masks_are_aes_in_counter_mode_as_the_standards_have_it() -> None:
    # The Galois/Counter Mode of Operation (McGrew and Viega 2005), test cases 1 and 2: the counters 0, 1, 2.
    gcm = "66e94bd4ef8a2c3b884cfa59ca342b2e58e2fccefa7e3061367f1d57a4e7455a0388dace60b6a392f328c2b971b2fe78"
    assert stream(KEY, 0, 48).hex() == gcm
    # RFC 3686, test vector 1: its nonce 00000030 heads the counter block, its counter begins at 1.
    key = bytes.fromhex("ae6852f8121067cc4bf7a5765577f39e")
    assert stream(key, 0x30 << 32, 32)[16:].hex() == "b7603328dbc2931b410e16c8067e62df"


def test_a_key_makes_other_masks_for_each_nonce() -> None:
    made = {stream(KEY, nonce, 64) for nonce in range(100)}
    assert len(made) == 100


def test_a_stream_goes_on_wherever_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.frombuffer(bytearray(stream(KEY, 0, 8000)), dtype=I64)
    monkeypatch.setattr(
        fixed_point, "_NUMBERS", 7
    )  # of 8 bytes each: no multiple of the cipher's blocks of 16
    mask, zeros = KeyStream(KEY), torch.zeros(1000, dtype=I64)
    parts = [FixedPoint(64, 24, 3).encode(part, added=[mask]) for part in zeros.split([0, 1, 499, 500])]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("bits", [32, 64])
def test_masks_go_in_and_out(bits: int) -> None:
    fixed = FixedPoint(bits, 20, 3)
    values = torch.randint(-1000, 1000, (70_000,)).float() / 1024
    plain = fixed.encode(values.clone())
    a, b = KEY[1:] + b"a", KEY[1:] + b"b"
    masked = fixed.encode(values.clone(), added=[KeyStream(a)], subtracted=[KeyStream(b, 7)])
    assert (masked == plain).float().mean() < 1e-3
    again = fixed.encode(
        values.clone(), added=[KeyStream(b, 7), KeyStream(a), KeyStream(b)], subtracted=[KeyStream(b, 7)]
    )
    back = torch.empty(70_000)
    fixed.decode_(again, back, [KeyStream(a), KeyStream(b)])
    assert torch.equal(back, values)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-30, 30, width=32), max_size=20),
    fractional_bits=st.integers(1, 24),
    bits=st.sampled_from([32, 64]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    block=st.sampled_from([2, 1 << 14]),
)
def test_numbers_come_back_to_half_a_unit(
    values: list[float], fractional_bits: int, bits: int, dtype: torch.dtype, block: int
) -> None:
    x = torch.tensor(values, dtype=dtype)
    before = x.double().clone()
    with mock.patch.object(fixed_point, "_NUMBERS", block):
        fixed = FixedPoint(bits, fractional_bits, 4)
        integers = fixed.encode(x)
        exact = [round(float(value) * 2**fractional_bits) for value in before]
        assert integers.tolist() == exact, "nearest integer, halves to even"
        back = torch.empty(len(values), dtype=torch.float64)
        fixed.decode_(integers, back)
    assert ((back - before).abs() <= 0.5 * 2.0**-fractional_bits).all()


def test_32_bits_take_no_memory_of_their_own_and_64_leave_the_numbers_alone() -> None:
    x = torch.ones(10)
    assert FixedPoint(64, 24, 3).encode(x).data_ptr() != x.data_ptr()
    assert torch.equal(x, torch.ones(10))
    assert FixedPoint(32, 24, 3).encode(x).data_ptr() == x.data_ptr()


# (2^63 - 1) / 4 is next to 2^61, which float64 takes for it; four times 2^61 would wrap around to -2^63.
@pytest.mark.parametrize("parties", [3, 4, 5, 8, 64, 100])
@pytest.mark.parametrize(("bits", "fractional_bits"), [(32, 1), (32, 24), (64, 1), (64, 24), (64, 56)])
def test_what_is_within_the_limit_never_wraps_around(parties: int, bits: int, fractional_bits: int) -> None:
    fixed = FixedPoint(bits, fractional_bits, parties)
    largest = torch.tensor([fixed.limit, -fixed.limit], dtype=torch.float64)
    high, low = fixed.encode(largest.clone()).tolist()
    assert high * parties < 2 ** (bits - 1)
    assert low * parties >= -(2 ** (bits - 1))
    assert high * parties > 0.99 * 2 ** (bits - 1)
    above = torch.nextafter(largest[:1], torch.tensor(torch.inf, dtype=torch.float64))
    with pytest.raises(OverflowError):
        fixed.encode(above)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("at", [0, 70_000])
def test_what_no_integer_stands_for_is_refused_wherever_it_is(value: float, at: int) -> None:
    x = torch.zeros(70_001)
    x[at] = value
    with pytest.raises(OverflowError):
        FixedPoint(64, 24, 3).encode(x)


def test_integers_stay_what_they_are() -> None:
    x = torch.tensor([2**60, -(2**60), 1])
    fixed = FixedPoint(64, 24, 3)
    encoded = fixed.encode(x)
    assert torch.equal(encoded, x)
    back = torch.empty_like(x)
    fixed.decode_(encoded, back)
    assert torch.equal(back, x)
