"""The tutorial notebook runs from top to bottom, and is kept without what it printed."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import documented_examples
import pytest
from documented_examples import run
from fork_server import python
from paths import EXAMPLES
from transformers import PreTrainedTokenizerFast

home = documented_examples.home
NOTEBOOK = json.loads((EXAMPLES / "tutorial.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_kept_without_outputs() -> None:
    """As ``jupyter nbconvert --clear-output`` leaves it, so that differences between versions can be read."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    for cell in NOTEBOOK["cells"]:
        own: dict[str, Any] = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        assert {key: cell.get(key) for key in own} == own
        assert cell.keys() == {"cell_type", "id", "metadata", "source", *own}
        assert not cell["metadata"]
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])


def as_script(cells: list[str]) -> str:
    """Write code cells as plain Python, with the files and the commands of the shell that IPython knows."""
    lines = ["import pathlib, subprocess, sys", f"sys.executable = {python()!r}"]
    for cell in cells:
        written = re.fullmatch(r"%%writefile (\S+)\n(.*)", cell, re.DOTALL)
        if written:
            lines.append(f"pathlib.Path({written[1]!r}).write_text({written[2] + chr(10)!r})")
        else:
            shell = r"\1sys.stdout.flush(); subprocess.run(f'''\2''', shell=True, check=True)"
            lines.append(re.sub(r"^( *)!(.*)$", shell, cell, flags=re.MULTILINE))
    return "\n".join(lines)


def test_cells_become_what_ipython_makes_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", sys.executable)  # the script sets another
    file = tmp_path / "written.txt"
    cells = [f"%%writefile {file}\nfirst\n!second", f"for n in range(2):\n    !echo {{n}}! >> {file}"]
    exec(as_script(cells), {})
    assert file.read_text() == "first\n!second\n0!\n1!\n"


@pytest.mark.torchrun
@pytest.mark.timeout(300)
def test_it_runs(home: Path) -> None:
    padded = PreTrainedTokenizerFast.from_pretrained(home / "runs/examples/minilm", pad_token="<eos>")
    padded.save_pretrained(home / "runs/examples/minilm")  # as the real one is
    (home / "tutorial.py").write_text(as_script(CODE), encoding="utf-8")
    output = run(home, "tutorial.py", timeout_s=270)
    runs = home / "runs/tutorial"
    parties = [runs / "federated", runs / "federated/party-1", runs / "federated/party-2"]
    together = [column(folder, "accuracy") for folder in parties]
    assert len(together[0]) == 4
    assert together == [together[0]] * 3, "all have the same adapter, and validate on the same texts"
    losses = [column(folder, "federated/local_loss") for folder in parties]
    assert [len(of_party) for of_party in losses] == [80 / 5] * 3
    assert len({of_party[0] for of_party in losses}) == 3, "each trains on texts of its own"
    table = dict(re.findall(r"^(federated|party \d alone) +([\d.]+)%$", output, re.MULTILINE))
    alone = {f"party {party} alone": column(runs / f"alone-{party}", "accuracy") for party in range(3)}
    for name, values in ({"federated": together[0]} | alone).items():
        assert float(table.pop(name)) == pytest.approx(100 * values[-1], abs=0.051)
    assert not table
    assert (runs / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def column(folder: Path, name: str) -> list[float]:
    """Return a column of a run's metrics, without the gaps."""
    (path,) = (folder / "lightning_logs").rglob("metrics.csv")
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
