"""How much memory is free, as the kernel describes it."""

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


@pytest.mark.parametrize(
    ("own", "limited", "names"),
    [
        # Slurm's step in its job: the job has the limit.
        ("0::/slurm/job_7/step_0\n", "slurm/job_7", ("memory.max", "memory.current")),
        (
            "1:name=systemd:/\n0::/user.slice/run.scope\n",
            "user.slice/run.scope",
            ("memory.max", "memory.current"),
        ),
        (
            "9:cpu,cpuacct:/other\n4:hugetlb,memory:/slurm/job_7\n0::/\n",
            "memory/slurm/job_7",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ),
        # Of a container that does not see the outer path.
        ("4:memory:/docker/1f\n", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        ("0::/../../outside\n", ".", ("memory.max", "memory.current")),
    ],
)
def test_the_smallest_of_all_groups_that_a_process_is_in(
    own: str, limited: str, names: tuple[str, str], tmp_path: Path
) -> None:
    proc = written(tmp_path / "proc", {"meminfo": "MemAvailable: 4096 kB\n", "self/cgroup": own})
    limit, use = names
    groups = written(tmp_path / "groups", {f"{limited}/{limit}": "9000\n", f"{limited}/{use}": "2000\n"})
    written(groups, {f"{limited}/memory.stat": "inactive_file 0\n", "other/memory.max": "1\n"})
    assert free_bytes(proc, groups) == 7000


def test_here_some_memory_is_free() -> None:
    assert free_bytes() > 10 * MB
