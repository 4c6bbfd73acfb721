"""Fixed-point numbers in a ring, and the streams that mask them."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellm_lightning.exchange import ring
from pellm_lightning.exchange.ring import Mask, Ring, add_masks_

I64 = torch.int64


def stream(key: bytes, nonce: int, size: int) -> bytes:
    return Mask(key, nonce).next(torch.empty(size // 4, dtype=torch.int32)).numpy().tobytes()


# RFC 8439, appendix A.1: keys and nonces as there, each with block counter 0 or, further on, 1.
# Its nonces are bytes; ours count, the lowest byte first, so 00..02 is 2 * 2^88.
def test_masks_are_chacha20_as_rfc_8439_has_it() -> None:
    first = (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    second = (
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert stream(bytes(32), 0, 128).hex() == first + second  # vectors 1 and 2
    fifth = (
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d"
    )
    assert stream(bytes(32), 2 << 88, 64).hex() == fifth


def test_a_key_makes_other_masks_for_each_nonce() -> None:
    made = {stream(bytes(32), nonce, 64) for nonce in range(100)}
    assert len(made) == 100


def test_a_stream_goes_on_wherever_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Mask(bytes(32)).next(torch.empty(1000, dtype=I64)).clone()
    monkeypatch.setattr(ring, "_BLOCK_BYTES", 56)  # seven integers: no multiple of ChaCha20's blocks of 64
    parts = torch.zeros(1000, dtype=I64)
    mask = Mask(bytes(32))
    for part in parts.split([0, 1, 499, 500]):
        add_masks_(part, [mask])
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("dtype", [torch.int32, I64])
def test_masks_go_in_and_out(dtype: torch.dtype) -> None:
    values = torch.randint(-1000, 1000, (70_000,), dtype=dtype)
    masked = values.clone()
    a, b = bytes(31) + b"a", bytes(31) + b"b"
    add_masks_(masked, [Mask(a)], [Mask(b, 7)])
    assert (masked == values).float().mean() < 1e-3
    add_masks_(masked, [Mask(b, 7)], [Mask(a)])
    assert torch.equal(masked, values)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-30, 30, width=32), max_size=20),
    fractional_bits=st.integers(1, 24),
    bits=st.sampled_from([32, 64]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    block=st.sampled_from([16, 1 << 18]),
)
def test_numbers_come_back_to_half_a_unit(
    values: list[float], fractional_bits: int, bits: int, dtype: torch.dtype, block: int
) -> None:
    x = torch.tensor(values, dtype=dtype)
    before = x.double().clone()
    with mock.patch.object(ring, "_BLOCK_BYTES", block):
        fixed = Ring(bits, fractional_bits, 4)
        integers = fixed.encode(x)
        exact = [round(float(value) * 2**fractional_bits) for value in before]
        assert integers.tolist() == exact, "nearest integer, halves to even"
        back = torch.empty(len(values), dtype=torch.float64)
        fixed.decode_(integers, back)
    assert ((back - before).abs() <= 0.5 * 2.0**-fractional_bits).all()


def test_32_bits_take_no_memory_of_their_own_and_64_leave_the_numbers_alone() -> None:
    x = torch.ones(10)
    assert Ring(64, 24, 3).encode(x).data_ptr() != x.data_ptr()
    assert torch.equal(x, torch.ones(10))
    assert Ring(32, 24, 3).encode(x).data_ptr() == x.data_ptr()


# (2^63 - 1) / 4 is next to 2^61, which float64 takes for it; four times 2^61 would wrap around to -2^63.
@pytest.mark.parametrize("parties", [3, 4, 5, 8, 64, 100])
@pytest.mark.parametrize(("bits", "fractional_bits"), [(32, 1), (32, 24), (64, 1), (64, 24), (64, 56)])
def test_what_is_within_the_limit_never_wraps_around(parties: int, bits: int, fractional_bits: int) -> None:
    fixed = Ring(bits, fractional_bits, parties)
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
        Ring(64, 24, 3).encode(x)


def test_integers_stay_what_they_are() -> None:
    x = torch.tensor([2**60, -(2**60), 1])
    fixed = Ring(64, 24, 3)
    encoded = fixed.encode(x)
    assert torch.equal(encoded, x)
    back = torch.empty_like(x)
    fixed.decode_(encoded, back)
    assert torch.equal(back, x)
