"""`pellm new`: what it writes runs as it is, with two parties, by the commands of its README."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fork_server import python
from launch import process_environ
from ports import free_port
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pellm_lightning.cli.main import main

CASES = ("script", "text", "classification")
PARTIES = ("one-launch", "separate-jobs")


def consoles(readme: Path) -> list[list[str]]:
    """Return the commands of each console block."""
    blocks = re.findall(r"```console\n(.*?)```", readme.read_text(), re.DOTALL)
    return [[line.removeprefix("$ ") for line in block.splitlines()] for block in blocks]


def started(command: str, folder: Path) -> subprocess.Popen[str]:
    """Start a command as typed, but for the programs, which are those of this checkout."""
    program, *words = shlex.split(command)
    by = {"pellm": ["-m", "pellm_lightning"], "torchrun": ["-m", "torch.distributed.run"], "python": []}
    return subprocess.Popen(
        [python(), *by[program], *words],
        cwd=folder,
        env=process_environ() | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_together(commands: list[str], folder: Path, until: int) -> None:
    """Run commands at the same time; the first ``until`` of them never end by themselves."""
    with ExitStack() as stack:
        processes = [started(command, folder) for command in commands]
        for process in processes:
            stack.callback(process.communicate)
            stack.callback(process.kill)
        for process in processes[until:]:
            out, _ = process.communicate(timeout=100)
            assert process.returncode == 0, out


def adapters(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    for path in sorted(folder.glob("run/**/adapter_model.safetensors")):
        yield load_file(path)


@pytest.mark.torchrun
@pytest.mark.timeout(240)
@pytest.mark.parametrize("parties", PARTIES)
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_runs_by_its_readme(case: str, parties: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert main(["new", str(folder), f"--case={case}", f"--parties={parties}"]) == 0
    port = str(free_port())
    for name in ("README.md", "run.yaml", "train.py"):  # parallel tests share this host
        path = folder / name
        path.write_text(path.read_text().replace("29400", port))
    *ways, [report] = consoles(folder / "README.md")
    if parties == "separate-jobs":
        assert ways[0][0].startswith("pellm rendezvous")
        ways[1].insert(0, ways[0][0])
    assert len(ways) == 2
    results = []
    for number, way in enumerate(ways):
        run_together(way, folder, until=int(parties == "separate-jobs"))
        trained = list(adapters(folder))
        assert len(trained) == (2 if parties == "separate-jobs" else 1)
        assert all(torch.equal(trained[0][name], other[name]) for other in trained for name in other)
        assert any(value.any() for name, value in trained[0].items() if "lora_B" in name)
        assert len(list(folder.rglob("rounds.jsonl"))) == 2
        results.append(trained[0])
        if number == 0:
            run_together([report], folder, until=0)
            assert (folder / "run/report.html").exists()
            (folder / "run").rename(tmp_path / "first")
    # The script says the same as the configuration.
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


@pytest.mark.parametrize("case", CASES)
def test_the_model_reads_and_answers(case: str, tmp_path: Path) -> None:
    main(["new", str(tmp_path / "mine"), f"--case={case}"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mine/model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine/model")
    text = "Ärzte, 医生\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model(**tokenizer(text, return_tensors="pt")).logits.isfinite().all()
    assert sum(p.numel() for p in model.parameters()) < 20_000


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "run.yaml").write_text("mine")
    with pytest.raises(SystemExit):
        main(["new", str(tmp_path)])
    told = " ".join(capsys.readouterr().err.split())  # lines are as long as the folder's path lets them be
    assert "has run.yaml already, and nothing is overwritten" in told
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "notes.txt": "mine",
        "run.yaml": "mine",
    }
    (tmp_path / "run.yaml").unlink()
    assert main(["new", str(tmp_path)]) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("parties", PARTIES)
@pytest.mark.parametrize("case", CASES)
def test_the_files_are_commented_and_name_each_other(case: str, parties: str, tmp_path: Path) -> None:
    main(["new", str(tmp_path), f"--case={case}", f"--parties={parties}"])
    config: dict[str, Any] = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert ("jobs" in config["federated"]) == (parties == "separate-jobs")
    for name in ("run.yaml", "train.py"):
        text = (tmp_path / name).read_text()
        assert text.count("YOURS") > 2
        assert "{%" not in text
        assert max(map(len, text.splitlines())) <= 120
    assert len((tmp_path / "README.md").read_text().splitlines()) < 70
    compile((tmp_path / "train.py").read_text(), "train.py", "exec")
