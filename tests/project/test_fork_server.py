"""What tests/helpers/fork_server.py says of itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import python


def run(code: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [python(), "-c", code], env=os.environ | environ, capture_output=True, text=True, check=False
    )


@pytest.mark.torchrun
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of C++ in /proc")
def test_what_is_forked_from_has_one_thread() -> None:
    """What another one held, such as the lock of an allocator, a fork would wait for."""
    originals = {run("import os; print(os.getppid())", RANK=rank).stdout.strip() for rank in "01"}
    assert len(originals) == 2
    for original in originals:
        assert len([*Path(f"/proc/{original}/task").iterdir()]) == 1


@pytest.mark.torchrun
def test_a_fork_that_a_signal_ends_says_where() -> None:
    done = run("import os\ndef here(): os.abort()\nhere()")
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr
    assert 'File "<string>", line 2 in here' in done.stderr
