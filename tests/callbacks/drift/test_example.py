"""The example of drift correction runs as documented."""

import csv
import shlex
from pathlib import Path

import documented_examples
import pytest
from documented_examples import documented, run
from paths import EXAMPLES

home = documented_examples.home


def test_is_listed_with_its_command() -> None:
    command = documented("drift/scaffold.yaml")
    assert f"#   {command}\n" in (EXAMPLES / "drift/scaffold.yaml").read_text()


@pytest.mark.torchrun
def test_scaffold(home: Path) -> None:
    program, *words = shlex.split(documented("drift/scaffold.yaml").replace("examples/", f"{EXAMPLES}/"))
    assert program == "torchrun"
    words[words.index("--nproc-per-node") + 1] = "2"
    run(home, "-m", "torch.distributed.run", *words, "--data.num_parties=2", "--trainer.max_epochs=2")
    for party in range(2):
        (path,) = (home / f"runs/examples/scaffold/party-{party}").rglob("metrics.csv")
        rows = list(csv.DictReader(path.read_text().splitlines()))
        assert len([row for row in rows if row["federated/round"]]) == 2
    assert (home / "runs/examples/scaffold/party-0/adapter/adapter_config.json").exists()
