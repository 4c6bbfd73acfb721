"""Mistakes that one process finds, by message and status; system/test_mistakes.py has those of a launch."""

import gzip
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pellm_lightning.cli.errors import MAX_LINES
from pellm_lightning.cli.main import main
from pellm_lightning.cli.new import new

# Lightning calls jsonargparse in a way that has gone out of use.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning", "ignore:No device id:UserWarning"
)


class Mistake(NamedTuple):
    """Words behind ``pellm``, what the message has, and the status."""

    words: str
    says: Sequence[str]
    status: int = 2
    edit: tuple[str, str] = ("", "")
    """What stands in the configuration for what."""


FIT = "fit --config=run.yaml"
JOBS = f"{FIT} --federated.jobs.name=a --federated.jobs.roster=[a,b] --federated.jobs.rendezvous"
EDITED = {
    "section": Mistake(FIT, ["modell", "Did you mean 'model'?"], edit=("\nmodel:", "\nmodell:")),
    "init_args": Mistake(
        FIT, ["'trainer.logger' has 'init_arg'", "Did you mean 'init_args'?"], edit=("init_args", "init_arg")
    ),
    "class_path": Mistake(
        FIT,
        ["'data' has 'class_pth'. Did you mean 'class_path'?"],
        edit=("class_path: pellm_lightning.tasks.TextData", "class_pth: pellm_lightning.tasks.TextData"),
    ),
    "no class_path": Mistake(
        FIT,
        ["data: has no class_path, the class that takes 'files'."],
        edit=("  class_path: pellm_lightning.tasks.TextDataModule\n", ""),
    ),
    "argument of an optimizer": Mistake(
        FIT,
        ["model.optimizer: torch.optim.AdamW: Option 'rate' is not accepted. It takes lr, betas, eps"],
        edit=("lr:", "rate:"),
    ),
    "optimizer": Mistake(FIT, ["no attribute 'AdamWW'. Did you mean 'AdamW'?"], edit=("AdamW\n", "AdamWW\n")),
    "number of an optimizer": Mistake(
        FIT, ["model.optimizer.lr: expected float; there is no class high."], edit=("lr: 1.0e-2", "lr: high")
    ),
    "class in a list": Mistake(
        FIT,
        ["has no attribute 'SaveAdaptr'. Did you mean 'SaveAdapter'?"],
        edit=("SaveAdapter", "SaveAdaptr"),
    ),
    "argument of a logger": Mistake(
        FIT, ["Option 'savedir' is not accepted. Did you mean 'save_dir'?"], edit=("save_dir", "savedir")
    ),
    "nested type": Mistake(
        FIT, ["model.peft.r: peft.LoraConfig: expected int, got 'eight'."], edit=("r: 8", "r: eight")
    ),
    "key twice": Mistake(
        FIT,
        ["run.yaml, line", "'trainer' is there twice, first in line", "Merge the two"],
        edit=("\nmodel:", "\ntrainer: {max_epochs: 1}\nmodel:"),
    ),
    "layers": Mistake(
        FIT,
        ["['q_prj']", "v_proj", "Did you mean 'q_proj'?"],
        1,
        ("[q_proj, v_proj]", "[q_prj]"),
    ),
    "learning rate": Mistake(FIT, ["Invalid learning rate: -1"], 1, ("lr: 1.0e-2", "lr: -1.0")),
}
MISTAKES = EDITED | {
    # ---- options of training
    "no data": Mistake("fit --config=untrained.yaml", ["CausalLM has no train_dataloader", "--data=CLASS"]),
    "nothing": Mistake("fit", ["--model is missing", "--config", "pellm fit --help"]),
    "empty file": Mistake("fit --config=empty.yaml", ["empty.yaml is empty", "Write options by name"]),
    "list": Mistake("fit --config=list.yaml", ["list.yaml holds a list"]),
    "tab": Mistake("fit --config=tab.yaml", ["tab.yaml, line 2, column 1: is not YAML", "not tabs"]),
    "list of options": Mistake(
        f"{FIT} --config=listed.yaml", ["'federated' holds [{'every_n_epochs': 1}].", "`federated: {every_"]
    ),
    "number of options": Mistake(f"{FIT} --config=three.yaml", ["'trainer' holds 3.", "{max_epochs: 3}`"]),
    "binary": Mistake("fit --config model/model.safetensors", ["model.safetensors", "is not UTF-8 text"]),
    "characters": Mistake("fit --config=bell.yaml", ["bell.yaml", "no text in YAML"]),
    "encoding": Mistake("fit --config=latin.yaml", ["latin.yaml, line 2", "0xe9", "iconv -f CP1252"]),
    "folder": Mistake("fit --config=data", ["Path is not a file", "data"]),
    "choice": Mistake(f"{FIT} --data.format=alpacca", ["got 'alpacca'. Did you mean 'alpaca'?"]),
    "name of an optimizer": Mistake(f"{FIT} --model.optimizer=AdmW", ["class AdmW. Did you mean 'AdamW'?"]),
    "before the command": Mistake("--config=run.yaml fit", ["pellm COMMAND --config run.yaml"]),
    "no command": Mistake("--confg run.yaml", ["pellm COMMAND --confg"]),
    "batch size": Mistake(f"{FIT} --data.batch_size=0", ["batch_size=0 must be at least 1."]),
    "workers": Mistake(f"{FIT} --data.num_workers=-1", ["num_workers=-1 must be at least 0."]),
    "share": Mistake(f"{FIT} --federated.weighting.max_share=2", ["max_share=2.0 must be above 0"]),
    "file of jobs": Mistake(f"{FIT} --federated.jobs=jobs/a.yaml", ["no file jobs/a.yaml", "is seen from"]),
    "key of jobs twice": Mistake(f"{FIT} --federated.jobs=twice.yaml", ["twice.yaml: line 4: 'name'"]),
    "membership": Mistake(f"{FIT} --federated.jobs=wait.yaml", ["'wait'. Did you mean 'wait_s'?"]),
    "scheme": Mistake(f"{JOBS}=127.0.0.1:1", ["rendezvous='127.0.0.1:1' names no rendezvous", "tcp://"]),
    # ---- files
    "checkpoint": Mistake(f"{FIT} --ckpt_path=cut.ckpt", ["is no whole checkpoint (1,000 bytes)"], 1),
    "last": Mistake(f"{FIT} --ckpt_path=lasst", ["'lasst' is no file", "Did you mean 'last'?"], 1),
    "weights": Mistake(f"{FIT} --model.model=cut", ["model='cut'", "weights are damaged", "again"], 1),
    "adapter": Mistake(f"{FIT} --model.adapter=data", ["adapter='data' is no folder of an adapter"], 1),
    "no rows": Mistake(f"{FIT} --data.files=none.parquet", ["none.parquet: has no rows"], 1),
    "no names": Mistake(f"{FIT} --data.files=[]", ["files=[] names no file"], 1),
    "digits": Mistake(f"{FIT} --data.files=digits.jsonl", ["digits.jsonl:1: holds what cannot be read"], 1),
    "cut": Mistake(f"{FIT} --data.files=cut.jsonl.gz", ["cut.jsonl.gz: is no whole compressed file"], 1),
    "root": Mistake(f"{FIT} --trainer.default_root_dir=run.yaml", ["A part of the path is a file"], 1),
    # ---- other commands
    "option of new": Mistake("new x --cases=text", ["Did you mean '--case'?", "pellm new --help"]),
    "choice of new": Mistake("new x --case=texts", ["got 'texts'. Did you mean 'text'?"]),
    "command of keys": Mistake("keys sing", ["invalid choice: 'sing'", "Did you mean 'sign'?"]),
    "no names of keys": Mistake("keys new --directory=keys --names=,", ["names=',' has no name"]),
    "name of a key": Mistake("keys new --directory=keys --names=a,../b", ["'../b' is no party's name"]),
    "nobody to revoke": Mistake("keys revoke --directory=keys --names=,", ["names=',' has no name"]),
    "name to revoke": Mistake("keys revoke --directory=keys --names=../b", ["'../b' is no party's name"]),
    "days": Mistake("certs --directory=keys --names=a --days=-1", ["days=-1.0 must be positive"]),
    "where keys go": Mistake("keys new --directory=run.yaml --names=a", ["run.yaml", "Move it away"], 1),
    "address": Mistake("rendezvous --listen=localhost", ["'localhost' is no address: give host:port"]),
    "host": Mistake(
        "rendezvous --listen=192.0.2.1:29400", ["cannot listen on 192.0.2.1", "an address of this machine"], 1
    ),
    "half of TLS": Mistake("rendezvous --listen=localhost:1 --tls.cert=a", ["tls", "required: key, ca"]),
    "files of TLS": Mistake(
        "rendezvous --listen=localhost:1 --tls.cert=a --tls.key=b --tls.ca=c", ["needs the file a"], 1
    ),
    "no record": Mistake("report data", ["There is no rounds.jsonl in data"], 1),
    "folder of a report": Mistake("report", ["run_dir is missing", "pellm report --help"]),
    "option of verify": Mistake("verify x --trsut=y", ["Did you mean '--trust'?", "pellm verify --help"]),
    "folder of verify": Mistake("verify", ["folder is missing", "pellm verify --help"]),
    "option of evaluate": Mistake("evaluate --parties=2 --adaptrs x=y", ["Did you mean '--adapters'?"]),
    "parties": Mistake("evaluate --parties=0", ["parties", "1 or more"]),
    "nothing to evaluate": Mistake("evaluate --parties=2 --no-base", ["There is nothing to evaluate"], 1),
    "out of export": Mistake("export a.ckpt", ["--out is missing"]),
    "misspelt out of export": Mistake("export a.ckpt --ot=b", ["Did you mean '--out'?"]),
    "export": Mistake("export run.yaml --out=out", ["run.yaml cannot be read", "another kind of file"], 1),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pellm new`` writes, and broken files."""
    folder = tmp_path_factory.mktemp("project")
    new(folder)
    files = {
        "empty.yaml": b"",
        "list.yaml": b"- trainer\n",
        "listed.yaml": b"federated:\n- every_n_epochs: 1\n",
        "three.yaml": b"trainer: 3\n",
        "bell.yaml": b"trainer: {max_epochs: 3}\a\n",
        "tab.yaml": b"trainer:\n\tmax_epochs: 3\n",
        "latin.yaml": "# no\nseed_everything: 1 # café\n".encode("cp1252"),
        "twice.yaml": b"rendezvous: tcp://localhost:1\nname: a\nroster: [a, b]\nname: b\n",
        "wait.yaml": b"rendezvous: tcp://localhost:1\nname: a\nroster: [a, b]\nmembership: {wait: 3}\n",
        "digits.jsonl": b'{"text": "w", "id": ' + b"9" * 5000 + b"}\n",
        "cut.jsonl.gz": gzip.compress(b'{"text": "w"}\n')[:-9],
    }
    run = (folder / "run.yaml").read_text()
    files["untrained.yaml"] = run.partition("\ndata:")[0].encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.save({"w": torch.zeros(1000)}, folder / "whole.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "whole.ckpt").read_bytes()[:1000])
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "none.parquet")
    (folder / "cut").mkdir()
    for path in (folder / "model").iterdir():
        content = path.read_bytes()
        (folder / "cut" / path.name).write_bytes(content[:3000] if path.suffix == ".safetensors" else content)
    return folder


@pytest.fixture
def command(project: Path, capsys: pytest.CaptureFixture[str]) -> "Iterator[Command]":
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setattr(sys, "path", list(sys.path))
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")  # which the commands set, is taken back
        yield Command(patch, capsys)


class Command:
    """A command in this process."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = patch, capsys

    def run(self, words: str) -> tuple[int, list[str]]:
        """Return status and lines."""
        self._patch.setattr(sys, "argv", ["pellm", *words.split()])
        with pytest.raises(SystemExit) as stopped:
            sys.exit(main())
        status = stopped.value.code
        assert isinstance(status, int)
        lines = self._capsys.readouterr().err.splitlines()
        first = next((k for k, line in enumerate(lines) if line.startswith("error:")), 0)
        return status, lines[first:]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported(name: str, command: Command, project: Path) -> None:
    mistake = MISTAKES[name]
    original = (project / "run.yaml").read_text()
    old, other = mistake.edit
    assert old in original
    try:
        (project / "run.yaml").write_text(original.replace(old, other) if old else original)
        status, lines = command.run(mistake.words)
    finally:
        (project / "run.yaml").write_text(original)
    text = " ".join(" ".join(lines).split())
    assert text.startswith("error: "), lines
    assert len(lines) <= MAX_LINES, lines
    assert "Traceback" not in text, lines
    for said in mistake.says:
        assert said in text
    assert status == mistake.status
    assert not (project / "keys").exists(), "something was made before the mistake was found"


def test_a_port_in_use(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, lines = command.run(f"rendezvous --listen=127.0.0.1:{taken.getsockname()[1]}")
    assert status == 1
    assert "Address already in use. Stop what uses this port" in " ".join(" ".join(lines).split())
