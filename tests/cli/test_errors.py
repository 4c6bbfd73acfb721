"""Errors of the command line in this process; system/test_mistakes.py runs it with two parties."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pellm_lightning import MismatchError, PartyLostError
from pellm_lightning.cli import errors
from pellm_lightning.comm.torchrun.store import claim_error


@pytest.fixture(autouse=True)
def patch(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pellm", "fit"])
        patch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
        handler = signal.getsignal(signal.SIGTERM)
        yield patch
        signal.signal(signal.SIGTERM, handler)


def raised(error: Exception) -> int:
    with pytest.raises(SystemExit) as stopped, errors.reported():
        raise error
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_an_expected_error_is_a_message_and_its_traceback_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    errors.set_place("party b", str(tmp_path / "run"))
    assert raised(MismatchError("Party a has 2 rounds, party b has 3. Give both the same.")) == 1
    told, *where = capsys.readouterr().err.splitlines()  # a long path has a line of its own
    assert told == "[party b] error: Party a has 2 rounds, party b has 3. Give both the same."
    assert " ".join("".join(where).split()) == f"The traceback is in {tmp_path / 'run' / 'error.log'}."
    assert "Traceback (most recent call last)" in (tmp_path / "run" / "error.log").read_text()
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == told


def test_a_long_message_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert raised(MismatchError("\n".join(f"line {k} " + "word " * 30 for k in range(20)))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == errors.MAX_LINES
    assert lines[-2:] == ["  ...", "To see the traceback, add --debug."]
    assert max(map(len, lines)) <= 100


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def matmul() -> None:
        torch.ones(2, 3) @ torch.ones(2, 3)

    with pytest.raises(SystemExit) as stopped, errors.reported():
        matmul()
    assert stopped.value.code == 1
    assert "in matmul" in capsys.readouterr().err


def test_debug_shows_what_is_expected_also(
    capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
) -> None:
    patch.setattr(sys, "argv", ["pellm", "fit", "--debug", "--x"])
    assert raised(MismatchError("unlike")) == 1
    assert sys.argv == ["pellm", "fit", "--x"]
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_file_is_told_with_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, errors.reported():
        Path("no/such.csv").read_text()
    assert stopped.value.code == 1
    text = " ".join(capsys.readouterr().err.split())
    assert f"'no/such.csv'. A relative path is seen from {Path.cwd()}." in text


def test_an_interrupt_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, errors.reported():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_a_launch_tells(
    rank: int, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in {**environ, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        patch.setenv(name, value)
    for turn, party in enumerate((rank, 1 - rank)):
        patch.setenv("RANK", str(party))
        place = f"data/{party}.csv:{party + 2}, object at 0x7f{party}c"
        words = f"Party {party} and party {1 - party} differ, in 7 of {{1, 2}} ({place})."
        assert raised(MismatchError(words)) == 1
        assert bool(capsys.readouterr().err) == (turn == 0)
    # torchrun terminates the first when it has seen the second end, which says nothing.
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    recorded = json.loads((tmp_path / "error.json").read_text())["message"]
    assert int(recorded["extraInfo"]["timestamp"]) < int(time.time())
    # Another error is told also, unless it is only that the first has failed.
    assert raised(MismatchError("something else")) == 1
    assert f"[party of rank {1 - rank}] error: something else" in capsys.readouterr().err
    assert raised(PartyLostError(f"Party {rank} left: they differ", by=str(rank))) == 1
    assert capsys.readouterr().err == ""


def test_without_a_store_everybody_tells(patch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        patch.setenv(name, value)
    assert claim_error("digest", second_hand=True)
