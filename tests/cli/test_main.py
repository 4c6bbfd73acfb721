"""The entry point: one help, one dispatcher."""

import subprocess
import sys
from pathlib import Path

import pytest
from run_records import federation

from pellm_lightning import FederatedCLI, __version__
from pellm_lightning.cli.main import MODULES, main


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_one_help_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 80
    commands = lines[: lines.index("Options of a command: pellm COMMAND --help")]
    listed = [line.split()[0] for line in commands if line.startswith("  ")]
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
    assert (
        err == f"error: pellm has no command '{word}'. Did you mean '{meant}'? All commands: pellm --help\n"
    )


def test_a_word_like_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"]) == 2
    assert capsys.readouterr().err == "error: pellm has no command 'xyzzy'. All commands: pellm --help\n"


def test_the_words_of_the_process_are_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pellm", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"pellm_lightning {__version__}\n"


# ---- what a command imports: of a process of its own

HEAVY = ("torch", "lightning", "transformers", "peft")


def imported_after(code: str, *words: str, status: int = 0) -> set[str]:
    """Return which of the heavy packages a process has imported after some code, run as ``pellm WORDS``."""
    found = f"print(file=sys.stderr), print(*(n for n in {HEAVY} if n in sys.modules), file=sys.stderr)"
    code = f"import atexit, sys\natexit.register(lambda: ({found}))\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return set(done.stderr.splitlines()[-1].split())


RUN = "from pellm_lightning.cli.main import main; sys.exit(main())"
LIGHT = {
    "help": ["--help"],
    "wrong": ["fti"],
    "version": ["--version"],
    **{name: [name, "--help"] for name in MODULES if MODULES[name] != "federated_cli"},
}


@pytest.mark.parametrize("words", LIGHT.values(), ids=LIGHT)
def test_what_trains_nothing_starts_without_torch(words: list[str]) -> None:
    assert imported_after(RUN, *words, status=2 if words == ["fti"] else 0) == set()


def test_the_collector_stays_as_the_caller_has_set_it() -> None:
    code = (
        "import gc; gc.disable(); from pellm_lightning.cli.main import _import;"
        "frozen = gc.get_freeze_count();"  # Python 3.12 begins with some
        "_import('pellm_lightning.cli.usage'); print(gc.isenabled(), gc.get_freeze_count() - frozen);"
        "gc.enable(); _import('pellm_lightning.cli.commands'); print(gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0", "True"]


def test_what_makes_files_runs_without_torch(tmp_path: Path) -> None:
    assert imported_after(RUN, "certs", f"--directory={tmp_path}", "--names=a,rendezvous") == set()
    assert (tmp_path / "a.pem").exists()
    federation(tmp_path / "runs", ["a", "b"], 2)
    assert imported_after(RUN, "report", str(tmp_path / "runs")) == set()
    assert (tmp_path / "runs/report.html").exists()
    assert imported_after(RUN, "rendezvous", "--listen=nowhere", status=2) == set()


def test_a_public_name_brings_what_it_needs() -> None:
    assert imported_after("import pellm_lightning; print(dir(pellm_lightning))") == set()
    code = "import pellm_lightning; pellm_lightning.Federation"
    assert imported_after(code) == {"torch"}


# Lightning calls jsonargparse in a way that has gone out of use.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_classes_of_a_script_in_this_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The console script starts without the folder on the path, where ``python -m`` has it."""
    (tmp_path / "own_classes.py").write_text(
        "import lightning.pytorch as pl\nclass Own(pl.LightningModule): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "argv", ["pellm", "fit", "--model=own_classes.Own", "--print_config"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert "class_path: own_classes.Own" in capsys.readouterr().out
