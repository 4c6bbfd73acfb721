"""The global state as bytes: whole or refused, and never half on disk."""

import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as packed_by_safetensors

from pellm_lightning.tensors import snapshot
from pellm_lightning.tensors.snapshot import DamagedError, Manifest, SnapshotDir, SnapshotError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]

tensors = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    ),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 99),
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers() | st.text(), inner, max_size=3),
    max_leaves=8,
)
states = st.dictionaries(st.text(), values, max_size=4)


def pack(state: Any) -> bytes:
    file = io.BytesIO()
    snapshot.write(state, file)
    return file.getvalue()


def unpack(packed: bytes) -> dict[str, Any]:
    return snapshot.read(io.BytesIO(packed))


def sent(state: Any) -> dict[str, Any]:
    """The state as a peer gets it: the manifest as text, then the tensors, one by one."""
    manifest, tensors = Manifest.of(state)
    arrived = Manifest.from_json(manifest.to_json())
    places = arrived.new_tensors()
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)
    assert arrived.sizes_bytes == [tensor.nbytes for tensor in tensors]
    return arrived.state(places)


def same(one: Any, other: Any) -> bool:
    """Equal in value and kind, tensors bit for bit; what was a tuple may be a list."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def adam_state() -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.arange(6.0))
    optimizer = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.99))
    parameter.grad = torch.ones(6)
    optimizer.step()
    return {"round": 3, "global": parameter.detach(), "outer_optimizer": optimizer.state_dict()}


@given(state=states)
def test_what_is_packed_comes_back(state: dict[str, Any]) -> None:
    assert same(state, unpack(pack(state)))
    assert same(state, sent(state))


def test_what_arrives_may_lie_in_memory_that_is_free() -> None:
    manifest, (vector, other) = Manifest.of({"global": torch.arange(6.0), "other": torch.ones(6)})
    free = torch.zeros(6)
    first, second = manifest.new_tensors(free)
    first.copy_(vector)
    second.copy_(other)
    assert torch.equal(free, torch.arange(6.0))
    assert manifest.new_tensors(torch.zeros(6, dtype=torch.int32))[0].dtype is torch.float32
    first[5] = math.nextafter(5.0, 9.0) + 1e-6
    with pytest.raises(DamagedError, match="digest"):
        manifest.state([first, second])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        '["{}", {}]',
        '["{}", [], ""]',
        '["{}", {"t0": ["F8", [1]]}, ""]',
        '["{}", {"t0": 3}, ""]',
    ]
    + [json.dumps(["{}", {"t0": ["F32", shape]}, ""]) for shape in ([-1, -2], 2, None, [None], "2")],
)
def test_a_manifest_that_lies_is_refused(text: str) -> None:
    with pytest.raises(DamagedError):
        Manifest.from_json(text).new_tensors()


def test_an_optimizer_goes_on_from_its_unpacked_state() -> None:
    state = adam_state()
    found = unpack(pack(state))
    assert same(state, found)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(6))])
    optimizer.load_state_dict(found["outer_optimizer"])
    assert optimizer.param_groups[0]["betas"] == [0.9, 0.99]
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], torch.full((6,), 0.1))


@given(state=states)
def test_the_bytes_are_safetensors(state: dict[str, Any]) -> None:
    """Those of its own functions are read, and they read ours: each value at its place, and all of them."""
    packed = pack(state)
    with tempfile.NamedTemporaryFile() as file:
        file.write(packed)
        file.flush()
        with safe_open(file.name, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
    assert json.loads(metadata["structure"])
    assert same(state, unpack(packed_by_safetensors(tensors, metadata)))


@given(state=states, data=st.data())
def test_a_damaged_state_is_refused(state: dict[str, Any], data: st.DataObject) -> None:
    packed = pack(state)
    where = data.draw(st.integers(0, len(packed) - 1))
    cut = packed[:where]
    with pytest.raises(DamagedError):
        unpack(cut)
    changed = bytearray(packed)
    changed[where] ^= 1 << data.draw(st.integers(0, 7))
    # A bit of the header may mean nothing, such as one of a blank; then what is read is the same.
    try:
        found = unpack(bytes(changed))
    except DamagedError:
        return
    assert same(state, found)


@given(raw=st.binary(max_size=200))
def test_other_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(DamagedError):
        unpack(raw)


HEADER = {"__metadata__": {}, "t0": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        {"__metadata__": None},
        {"__metadata__": [], "t0": 3},
        HEADER | {"t0": {}},
        HEADER | {"t1": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},  # the same bytes twice
        HEADER | {"t1": {"dtype": "F32", "shape": [2], "data_offsets": ["0", None]}},
        *({**HEADER, "t0": HEADER["t0"] | {"dtype": dtype}} for dtype in ("F8", 4, [])),
        *(
            {**HEADER, "t0": HEADER["t0"] | {"shape": shape}}
            for shape in ([-1, -2], [2.0], [1, 1], [1 << 70], [0, 1 << 62, 1 << 62], "2", 2)
        ),
        *(
            {**HEADER, "t0": HEADER["t0"] | {"data_offsets": offsets}}
            for offsets in ([8, 0], [-8, 0], [0], [0, 8, 9], [4, 12], [0, 1 << 50], None)
        ),
        {**HEADER, "t0": {"dtype": "F32", "shape": [1 << 48], "data_offsets": [0, 1 << 50]}},
    ],
)
def test_a_header_that_lies_is_refused(header: Any) -> None:
    words = json.dumps(header).encode()
    with pytest.raises(DamagedError) as caught:
        unpack(len(words).to_bytes(8, "little") + words + bytes(8))
    assert "'digest'" not in str(caught.value), "nothing was wrong until the digest was looked for"


class Planted:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("planted code was run",)


def test_no_planted_code_runs(tmp_path: Path) -> None:
    """A peer, or whoever can write into the folder, sends what others load by pickle."""
    for number, save in enumerate((torch.save, lambda x, path: path.write_bytes(pickle.dumps(x)))):
        path = tmp_path / f"round-{number}.safetensors"
        save({"round": Planted()}, path)
        with pytest.raises(DamagedError):
            unpack(path.read_bytes())
        with pytest.raises(DamagedError):
            SnapshotDir(tmp_path).newest()


def test_equal_states_have_equal_digests_and_no_others() -> None:
    state = adam_state()
    assert snapshot.digest(state) == snapshot.digest(adam_state())
    for change in ({"round": 4}, {"global": state["global"].double()}, {"global": state["global"].flip(0)}):
        assert snapshot.digest(state | change) != snapshot.digest(state)
    nudged = state["global"].clone()
    nudged[5] = math.nextafter(float(nudged[5]), 100) + 1e-6
    assert snapshot.digest(state | {"global": nudged}) != snapshot.digest(state)


def test_an_object_is_no_state() -> None:
    with pytest.raises(TypeError, match="cannot hold a object"):
        pack({"x": object()})
    with pytest.raises(TypeError, match="cannot hold a Tensor of complex64"):
        pack({"x": torch.zeros(2, dtype=torch.complex64)})


def test_the_last_two_rounds_are_kept(tmp_path: Path) -> None:
    states = SnapshotDir(tmp_path / "new" / "federation")
    assert states.newest() is None
    for round in (8, 9, 10, 10, 11):
        states.keep(round, {"round": round})
    assert sorted(path.name for path in states.path.iterdir()) == [
        "recycled.partial",
        "round-10.safetensors",
        "round-11.safetensors",
    ]
    assert states.newest() == {"round": 11}
    states.clear()
    assert states.newest() is None
    assert not list(states.path.iterdir())


def test_a_file_that_overwrites_a_longer_or_shorter_one_is_whole(tmp_path: Path) -> None:
    states = SnapshotDir(tmp_path)
    for round, size in enumerate((9, 900, 5, 40_000, 3, 3, 70, 0)):
        state = {"round": round, "global": torch.arange(float(size)), "text": "x" * size}
        states.keep(round, state)
        assert same(states.newest(), state)
        with safe_open(tmp_path / f"round-{round}.safetensors", "pt") as opened:
            assert len(opened.metadata()["digest"]) == 64


def test_what_is_on_disk_has_its_sha_256(tmp_path: Path) -> None:
    """By our own reading of the file: the structure, then each tensor's name, dtype, shape and bytes."""
    values = torch.arange(300_000.0)  # more than one block of the digest by which parties vote
    SnapshotDir(tmp_path).keep(0, {"global": values})
    with safe_open(tmp_path / "round-0.safetensors", "pt") as opened:
        metadata = opened.metadata()
    expected = hashlib.sha256(metadata["structure"].encode())
    expected.update(b"t0 torch.float32 [300000]")
    expected.update(values.numpy().tobytes())
    assert metadata["digest"] == expected.hexdigest()


def test_a_state_without_its_digest_is_refused(tmp_path: Path) -> None:
    """So is one whose write was interrupted after its tensors, before its header."""
    SnapshotDir(tmp_path).keep(0, adam_state())
    path = tmp_path / "round-0.safetensors"
    with safe_open(path, "pt") as opened:
        digest = opened.metadata()["digest"].encode()
    path.write_bytes(path.read_bytes().replace(digest, b"0" * 64))
    with pytest.raises(DamagedError, match="its digest does not match its content"):
        SnapshotDir(tmp_path).newest()


def test_a_file_cut_in_half_is_refused_and_no_older_one_taken_for_it(tmp_path: Path) -> None:
    """The round may have been committed, and this party be one of the few that have it."""
    states = SnapshotDir(tmp_path)
    states.keep(4, adam_state())
    states.keep(5, adam_state())
    newest = tmp_path / "round-5.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with pytest.raises(DamagedError) as caught:
        states.newest()
    message = str(caught.value)
    assert str(newest) in message
    assert "Do not delete it" in message
    assert "round 5" in message
    assert f"move the whole directory {tmp_path} away" in message


def test_a_directory_of_another_party_is_refused(tmp_path: Path) -> None:
    """Shared with it, or copied from it."""
    SnapshotDir(tmp_path / "a", "a").claim()
    SnapshotDir(tmp_path / "a", "a").claim()  # a second fit of the same process
    shutil.copytree(tmp_path / "a", tmp_path / "copied")
    for name in ("a", "copied"):
        with pytest.raises(
            SnapshotError, match=r"Party b cannot use .*, which is that of party a\. Give each"
        ):
            SnapshotDir(tmp_path / name, "b").claim()
    SnapshotDir(tmp_path / "a", "a").clear()
    SnapshotDir(tmp_path / "a", "b").claim()  # a federation that has ended leaves no owner
    SnapshotDir(tmp_path / "a", "b").clear()


@pytest.mark.skipif(sys.platform == "win32", reason="only the name is checked there")
def test_a_directory_that_another_process_uses_is_refused(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            SnapshotDir(tmp_path, "a").claim()
            os.write(writer, b"1")
            time.sleep(30)
        finally:
            os._exit(0)
    try:
        os.read(reader, 1)
        with pytest.raises(SnapshotError, match="is used by another process of party a"):
            SnapshotDir(tmp_path, "a").claim()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    SnapshotDir(tmp_path, "a").claim()  # a killed process leaves no lock
    SnapshotDir(tmp_path, "a").clear()


def test_a_directory_that_cannot_be_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        SnapshotError, match=r"Party a cannot use its global state in .*file/state: Not a direc"
    ):
        SnapshotDir(tmp_path / "file/state", "a").claim()


def test_a_write_that_fails_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = SnapshotDir(tmp_path)
    states.keep(1, {"round": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pellm_lightning.tensors.snapshot.os.fsync", full)
    with pytest.raises(SnapshotError, match=r"cannot write .* No space left on device\. Make room there, or"):
        states.keep(2, {"round": 2})
    assert states.newest() == {"round": 1}
