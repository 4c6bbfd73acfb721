"""Named tensors as one flat float32 vector, and back."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pellm_lightning.tensors import flat_buffer
from pellm_lightning.tensors.flat_buffer import Layout


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut vectors of a few dozen scalars as those of millions are."""
    monkeypatch.setattr(flat_buffer, "_CHUNK", 8)
    monkeypatch.setattr(flat_buffer, "_BUCKET", 24)


def numbers(*shape: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + math.prod(shape), dtype=torch.float32).view(shape)


def of_every_kind() -> dict[str, Tensor]:
    """Tensors whose values, in the order of their names, count up from 0."""
    return {
        "e slice": torch.cat([torch.zeros(5), numbers(6, start=33), torch.zeros(5)])[5:11],
        "a number": torch.tensor(0.0),
        "c long": numbers(4, 5, start=13),
        "b half": numbers(3, 4, start=1).to(torch.bfloat16),
        "f across": numbers(5, 3, start=39).t().contiguous().t(),
        "d empty": torch.zeros(0, 7),
        "g parameter": nn.Parameter(numbers(30, start=54)),
        "h double": numbers(2, start=84).double(),
    }


# ---- to the vector and back


def test_packing_follows_the_names(small: None) -> None:
    flat = Layout(of_every_kind())
    assert flat.names == sorted(of_every_kind())
    assert flat.size == 86
    vector = flat.new_vector()
    assert (vector.shape, vector.dtype, vector.device.type) == ((86,), torch.float32, "cpu")
    assert flat.pack_(vector) is vector
    assert torch.equal(vector, numbers(86))


def test_packing_does_not_depend_on_the_order_of_the_mapping() -> None:
    tensors = of_every_kind()
    turned = Layout(dict(reversed(tensors.items())))
    assert torch.equal(turned.pack_(turned.new_vector()), numbers(86))
    assert (turned.names, turned.dtypes) == (Layout(tensors).names, Layout(tensors).dtypes)


def test_unpacking_writes_in_place_and_nothing_else(small: None) -> None:
    tensors = of_every_kind()
    surroundings = tensors["e slice"]._base
    before = {name: (t.data_ptr(), t.shape, t.stride(), t.dtype) for name, t in tensors.items()}
    Layout(tensors).unpack_(numbers(86) + 0.5)
    assert before == {name: (t.data_ptr(), t.shape, t.stride(), t.dtype) for name, t in tensors.items()}
    assert surroundings is not None
    assert not surroundings[:5].any()
    assert not surroundings[11:].any()
    assert tensors["a number"] == 0.5
    assert torch.equal(tensors["c long"], numbers(4, 5, start=13) + 0.5)
    assert torch.equal(tensors["f across"], numbers(5, 3, start=39) + 0.5)
    assert torch.equal(tensors["h double"], numbers(2, start=84).double() + 0.5)
    assert torch.equal(tensors["b half"], (numbers(3, 4, start=1) + 0.5).to(torch.bfloat16))


def test_writing_a_parameter_leaves_no_trace_in_its_graph() -> None:
    weight = nn.Parameter(torch.zeros(3))
    flat = Layout({"weight": weight})
    flat.unpack_(torch.ones(3))
    assert weight.is_leaf
    assert weight.requires_grad
    (weight.sum() * 2).backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    assert not flat.pack_(flat.new_vector()).requires_grad


# Shapes of up to three dimensions, contiguous or not, of any dtype, cut anywhere.
tensors_of_any_kind = st.lists(
    st.tuples(
        st.lists(st.integers(0, 6), max_size=3),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
).filter(lambda drawn: any(math.prod(shape) for shape, _, _ in drawn))


@given(tensors_of_any_kind, st.integers(1, 40), st.integers(1, 60))
def test_what_is_packed_comes_back(
    drawn: list[tuple[list[int], torch.dtype, bool]], chunk: int, bucket: int
) -> None:
    tensors: dict[str, Tensor] = {}
    for index, (shape, dtype, across) in enumerate(drawn):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(index)).to(dtype)
        tensors[f"{index}"] = tensor.transpose(0, -1) if across and tensor.dim() else tensor
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flat_buffer, "_CHUNK", chunk)
        patched.setattr(flat_buffer, "_BUCKET", bucket)
        flat = Layout(tensors)
        vector = flat.pack_(flat.new_vector())
        expected = torch.cat([tensors[name].reshape(-1).float() for name in sorted(tensors)])
        assert torch.equal(vector, expected)
        check_cuts(flat, bucket)
        for tensor in tensors.values():
            tensor.fill_(math.nan)
        flat.unpack_(vector * 3)
    for name, written in zip(
        sorted(tensors), (vector * 3).split([tensors[n].numel() for n in sorted(tensors)]), strict=True
    ):
        assert torch.equal(tensors[name], written.view(tensors[name].shape).to(tensors[name].dtype))


def check_cuts(flat: Layout, bucket: int) -> None:
    """Chunks and buckets tile the vector; a bucket is no longer than it may be, unless one chunk is."""
    chunks = flat.chunks()
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == flat.size
    assert all(chunk.size == sum(piece.numel() for piece in chunk.pieces) > 0 for chunk in chunks)
    assert [chunk for group in flat.buckets() for chunk in group] == chunks
    assert all(len(group) == 1 or group[-1].stop - group[0].start <= bucket for group in flat.buckets())
    assert flat.new_scratch().numel() == max(chunk.size for chunk in chunks)


def test_chunks_reach_into_the_parameters_and_are_no_longer_than_they_may_be(small: None) -> None:
    tensors = {"a": numbers(50), "b": numbers(3), "c": numbers(2), "d": numbers(4, 5).t()}
    flat = Layout(tensors)
    check_cuts(flat, 24)
    assert max(chunk.size for chunk in flat.chunks()) <= 8
    for chunk in flat.chunks():
        chunk.scatter_(torch.full((chunk.size,), -1.0))
    assert all((tensor == -1).all() for tensor in tensors.values())


def test_where_it_is_cut_does_not_depend_on_strides(small: None) -> None:
    # Else two parties of the same schema would hand over buckets of different sizes.
    def cuts(first: Tensor, second: Tensor) -> tuple[list[int], list[int]]:
        flat = Layout({"a": numbers(3), "b": first, "c": second, "d": numbers(5)})
        return [chunk.start for chunk in flat.chunks()], [group[0].start for group in flat.buckets()]

    wide, narrow = numbers(9, 10), numbers(2, 2)
    plain = cuts(wide, narrow)
    assert cuts(wide.t().contiguous().t(), narrow) == plain
    assert cuts(wide, narrow.t().contiguous().t()) == plain
    assert cuts(torch.zeros(9, 20)[:, ::2], torch.zeros(2, 4)[:, ::2]) == plain


def test_many_small_tensors_share_a_chunk() -> None:
    flat = Layout({f"{index:03}": numbers(7) for index in range(100)})
    assert len(flat.chunks()) == len(flat.buckets()) == 1


# ---- groups that cross without each other


def grouped() -> tuple[dict[str, Tensor], list[set[str]]]:
    """Two groups with an empty one between them; names of one lie between names of the other."""
    tensors = {"a": numbers(5), "b": numbers(9), "c": numbers(30), "d": numbers(2), "e": numbers(4)}
    return tensors, [{"e", "a", "c"}, set(), {"d", "b"}]


def test_groups_stand_one_after_the_other_each_sorted_by_name(small: None) -> None:
    tensors, groups = grouped()
    flat = Layout(tensors, groups)
    assert flat.names == ["a", "c", "e", "b", "d"]
    assert list(flat.shapes) == flat.names
    assert len(flat.dtypes) == len(flat.names)
    expected = torch.cat([tensors[name] for name in flat.names])
    assert torch.equal(flat.pack_(flat.new_vector()), expected)
    flat.unpack_(expected + 100)
    assert torch.equal(tensors["c"], numbers(30) + 100)
    assert torch.equal(tensors["b"], numbers(9) + 100)


def test_the_order_inside_a_group_is_that_of_the_names_whatever_holds_them() -> None:
    tensors, _ = grouped()
    turned = Layout(dict(reversed(tensors.items())), [["c", "e", "a"], ["d", "b"]])
    assert turned.names == ["a", "c", "e", "b", "d"]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), min_size=1, max_size=9).filter(
        lambda drawn: any(size for size, _ in drawn)
    ),
    st.integers(1, 40),
    st.integers(1, 60),
)
def test_no_chunk_and_no_bucket_spans_two_groups(
    drawn: list[tuple[int, int]], chunk: int, bucket: int
) -> None:
    tensors = {f"{index}": numbers(size) for index, (size, _) in enumerate(drawn)}
    groups = [{f"{index}" for index, (_, group) in enumerate(drawn) if group == which} for which in range(3)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flat_buffer, "_CHUNK", chunk)
        patched.setattr(flat_buffer, "_BUCKET", bucket)
        flat = Layout(tensors, groups)
        check_cuts(flat, bucket)
        ends = [0]
        for group in groups:
            ends.append(ends[-1] + sum(tensors[name].numel() for name in group))
        for part in flat.chunks():
            assert ends[part.group] <= part.start < part.stop <= ends[part.group + 1]
        for parts in flat.buckets():
            assert len({part.group for part in parts}) == 1


def test_a_view_is_the_parameter_s_place_in_a_vector(small: None) -> None:
    tensors = {"a": numbers(3), "b": numbers(4, 5), "c": torch.tensor(0.0), "d": numbers(2, 0)}
    flat = Layout(tensors, [["b", "d"], ["a", "c"]])
    vector = numbers(flat.size)
    assert torch.equal(flat.view(vector, "b"), numbers(4, 5))
    assert torch.equal(flat.view(vector, "a"), numbers(3, start=20))
    assert torch.equal(flat.view(vector, "c"), torch.tensor(23.0))
    assert flat.view(vector, "d").shape == (2, 0)
    flat.view(vector, "b").fill_(-1)
    assert (vector[:20] == -1).all()
    assert torch.equal(vector[20:], numbers(4, start=20))


def test_a_view_is_the_same_in_a_vector_with_something_behind() -> None:
    flat = Layout({"a": numbers(3), "b": numbers(2, 2)})
    vector = torch.zeros(flat.size + 4)
    flat.view(vector, "b").copy_(torch.ones(2, 2))
    assert vector.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]


# ---- what the parameters really hold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_as_written_is_what_a_read_gives_after_the_write(dtype: torch.dtype, small: None) -> None:
    tensors = {
        "a": torch.zeros(20, dtype=dtype),
        "b": torch.zeros(6),
        "c": torch.zeros(3, 4, dtype=dtype).t(),
    }
    flat = Layout(tensors)
    values = torch.randn(flat.size, generator=torch.Generator().manual_seed(0)) * 10
    kept = values.clone()
    for chunk in flat.chunks():
        at = slice(chunk.start, chunk.stop)
        told = chunk.as_written(values[at], torch.full((chunk.size,), math.nan))
        chunk.scatter_(values[at])
        assert torch.equal(told, chunk.gather_(torch.empty(chunk.size)))
    assert torch.equal(values, kept)
    narrow = dtype in (torch.bfloat16, torch.float16)
    assert torch.equal(flat.pack_(flat.new_vector()), values) is not narrow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_subtracting_is_gathering_and_subtracting(dtype: torch.dtype, small: None) -> None:
    flat = Layout({"a": numbers(30).to(dtype), "b": numbers(2).to(dtype), "c": numbers(3)})
    for chunk in flat.chunks():
        out = torch.full((chunk.size,), math.nan)
        result = chunk.subtracted_from(torch.ones(chunk.size), out=out)
        assert result.data_ptr() == out.data_ptr()
        assert torch.equal(out, 1 - chunk.gather_(torch.empty(chunk.size)))


# ---- storage that moves


@pytest.mark.parametrize(
    "data",
    [
        numbers(6, 7),
        numbers(6, 7).t().contiguous().t(),
        numbers(6, 7).double(),
        numbers(6, 7).to(torch.bfloat16),
    ],
    ids=["elsewhere", "across", "wider", "narrower"],
)
def test_storage_that_has_moved_is_found(data: Tensor, small: None) -> None:
    weight = nn.Parameter(torch.zeros(6, 7), requires_grad=False)
    flat = Layout({"weight": weight})
    flat.pack_(flat.new_vector())
    weight.data = data.clone(memory_format=torch.preserve_format)  # as ``module.to(...)`` does
    assert torch.equal(flat.pack_(flat.new_vector()), numbers(42))
    flat.unpack_(numbers(42) + 1)
    assert torch.equal(weight.float(), numbers(6, 7) + 1)
    assert weight.dtype == data.dtype


# ---- what is told, and what is refused


def test_names_shapes_and_dtypes_have_one_order() -> None:
    layout = Layout({"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.tensor(0.0)})
    assert layout.names == ["a", "b"]
    assert layout.shapes == {"a": [], "b": [2, 3]}
    assert layout.dtypes == ["float32", "bfloat16"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_parameter_that_is_not_finite_is_named(bad: float) -> None:
    tensors = {"a": torch.full((3,), 3e38), "b": torch.zeros(4), "c": torch.zeros(2)}
    assert Layout(tensors).first_nonfinite() is None
    tensors["c"][1] = bad
    assert Layout(tensors).first_nonfinite() == "c"
    tensors["b"][3] = bad
    assert Layout(tensors).first_nonfinite() == "b"


@pytest.mark.parametrize(
    "tensors", [{}, {"a": torch.zeros(0)}, {"a": torch.zeros(3, 0), "b": torch.zeros(0)}]
)
def test_nothing_to_federate_is_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="no parameter to federate"):
        Layout(tensors)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_what_cannot_be_averaged_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"'b' has dtype {dtype}"):
        Layout({"a": torch.zeros(2), "b": torch.zeros(2, dtype=dtype)})


def test_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"several devices \(cpu, meta\)"):
        Layout({"a": torch.zeros(2), "b": torch.zeros(2, device="meta")})


def test_sharded_parameters_are_refused() -> None:
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.zeros(4), DeviceMesh("cpu", [0]), [Shard(0)])
        for tensor in (sharded, nn.Parameter(sharded)):
            with pytest.raises(ValueError, match=r"'w' is a DTensor.*FederatedAveraging, which"):
                Layout({"w": tensor})
    finally:
        dist.destroy_process_group()
