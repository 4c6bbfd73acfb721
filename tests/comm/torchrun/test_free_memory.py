"""How much memory is free, as the kernel tells it."""

from pathlib import Path

import pytest

from pellm_lightning.comm.torchrun.free_memory import free_bytes

MB = 1_000_000


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, 4096 * 1024),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 4096 * 1024),
        # 3 MB less 2.5 MB, of which 0.2 MB are files that can be read again.
        (
            {
                "memory.max": f"{3 * MB}\n",
                "memory.current": "2500000\n",
                "memory.stat": "anon 9\ninactive_file 200000\n",
            },
            700_000,
        ),
        (
            {
                "memory/memory.limit_in_bytes": f"{2 * MB}\n",
                "memory/memory.usage_in_bytes": f"{MB}\n",
                "memory/memory.stat": "cache 7\ninactive_file 0\n",
            },
            MB,
        ),
        # A group without a limit has this number in version 1.
        (
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "1\n",
                "memory/memory.stat": "inactive_file 0\n",
            },
            4096 * 1024,
        ),
    ],
)
def test_the_smaller_of_host_and_container(groups: dict[str, str], expected: int, tmp_path: Path) -> None:
    proc = written(tmp_path / "proc", {"meminfo": "MemTotal: 9999 kB\nMemAvailable:    4096 kB\n"})
    assert free_bytes(proc, written(tmp_path / "groups", groups)) == expected


def test_here_some_memory_is_free() -> None:
    assert free_bytes() > 10 * MB
