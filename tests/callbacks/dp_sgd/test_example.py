"""The example of record-level privacy runs as documented."""

import csv
import shlex
from pathlib import Path

import documented_examples
import pytest
from documented_examples import documented, run
from paths import EXAMPLES

from pellm_lightning.callbacks.dp_sgd.poisson_sampling import PoissonAccountant

home = documented_examples.home


def test_is_listed_with_its_command() -> None:
    command = documented("privacy/record_level.yaml")
    assert f"#   {command}\n" in (EXAMPLES / "privacy/record_level.yaml").read_text()


@pytest.mark.torchrun
def test_record_level(home: Path) -> None:
    program, *words = shlex.split(
        documented("privacy/record_level.yaml").replace("examples/", f"{EXAMPLES}/")
    )
    assert program == "torchrun"
    words[words.index("--nproc-per-node") + 1] = "2"
    run(home, "-m", "torch.distributed.run", *words, "--data.num_parties=2", "--trainer.max_epochs=2")
    for party in range(2):
        (path,) = (home / f"runs/examples/record_level/party-{party}").rglob("metrics.csv")
        rows = list(csv.DictReader(path.read_text().splitlines()))
        logged = [float(row["privacy/epsilon_records"]) for row in rows if row["privacy/epsilon_records"]]
        # The table has 1014 rows: 507 at each of two parties, in four batches an epoch.
        accountant, expected = PoissonAccountant(), []
        for _ in range(2):
            accountant.step(2.0, 128 / 507, 4)
            expected.append(accountant.epsilon(1e-4))
        assert logged == pytest.approx(expected, rel=1e-6)
        assert len([row for row in rows if row["federated/round"]]) == 2
    assert (home / "runs/examples/record_level/party-0/adapter/adapter_config.json").exists()
