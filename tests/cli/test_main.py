"""The entry point: one help, one dispatcher."""

import sys

import pytest

from pellm_lightning import FederatedCLI, __version__
from pellm_lightning.cli.main import MODULES, main


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_one_help_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 110
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == list(MODULES)
    assert {*FederatedCLI.subcommands()} <= {*listed}


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pellm_lightning {__version__}\n"


@pytest.mark.parametrize(
    ("word", "meant"), [("fti", "fit"), ("raport", "report"), ("rendezvos", "rendezvous"), ("Fit", "fit")]
)
def test_a_wrong_command_is_corrected(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word, "--config=run.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"pellm has no command '{word}'. Did you mean {meant}? All commands: pellm --help\n"


def test_a_word_like_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"]) == 2
    assert capsys.readouterr().err == "pellm has no command 'xyzzy'. All commands: pellm --help\n"


def test_the_words_of_the_process_are_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pellm", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"pellm_lightning {__version__}\n"
