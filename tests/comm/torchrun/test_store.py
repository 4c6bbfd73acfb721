"""Texts of any length in torch's stores."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from pellm_lightning.comm.torchrun.store import delete_text, get_text, put_text

_HEADERS = 64  # of a request, besides key and values
_BUFFER_BYTES = 4096  # of torch 2.7's server, which drops who fills it just so


class Recorded:
    """A store that records the bytes of each request, and has none without an answer."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self.sizes: list[int] = []

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self.sizes.append(len(key) + len(expected) + len(desired) + _HEADERS)
        return self._store.compare_set(key, expected, desired)


# As a request of their own, the last three end a connection to torch 2.7's server.
@pytest.mark.parametrize("length", [0, 1, 2999, 3000, 3001, 6000, 40_000, 8171, 12_267, 16_363])
def test_a_text_of_any_length_arrives(length: int) -> None:
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    writer, reader = (
        dist.TCPStore("127.0.0.1", host.port, is_master=False, timeout=timedelta(seconds=20))
        for _ in range(2)
    )
    text = "".join(chr(ord("a") + index % 23) for index in range(length))
    before = host.num_keys()
    recorded = Recorded(writer)
    put_text(recorded, "abc", text)  # type: ignore[arg-type]
    assert max(recorded.sizes) < _BUFFER_BYTES
    assert get_text(reader, "abc") == get_text(writer, "abc") == text
    delete_text(reader, "abc")
    assert host.num_keys() == before


def test_a_key_is_there_only_when_its_whole_text_is() -> None:
    store = dist.HashStore()
    seen: list[bool] = []

    class Watched:
        def compare_set(self, key: str, expected: str, desired: str) -> bytes:
            seen.append(store.check(["abc"]))
            return store.compare_set(key, expected, desired)

    put_text(Watched(), "abc", "x" * 10_000)  # type: ignore[arg-type]
    assert seen == [False] * 4
    assert get_text(store, "abc") == "x" * 10_000


@pytest.mark.parametrize("kind", ["file", "prefix", "hash"])
def test_other_stores_of_torch_hold_texts(kind: str, tmp_path: Path) -> None:
    store: dist.Store = dist.FileStore(str(tmp_path / "store"), 1) if kind == "file" else dist.HashStore()
    if kind == "prefix":
        store = dist.PrefixStore("pellm/1", store)
    put_text(store, "abc", "y" * 7000)
    assert get_text(store, "abc") == "y" * 7000
    delete_text(store, "abc")
    assert not store.check(["abc"])
    assert not store.check(["abc/1"])
