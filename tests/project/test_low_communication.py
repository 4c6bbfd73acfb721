"""The script that measures loss against bytes runs, and its bytes are what they should be."""

import json
import sys
from pathlib import Path

import pytest
from paths import BENCHMARKS

from pellm_lightning.comm.torchrun.federation import SLOT_BYTES

VARIANTS = ["gradients at every step", "DiLoCo", "DiLoCo, 4 bits, overlapped"]


@pytest.mark.timeout(120)
def test_the_table_is_made_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    from low_communication import main

    arguments, kept = ["--tiny", f"--folder={tmp_path}", "--variants", *VARIANTS], tmp_path / "tiny.json"
    main(arguments)
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in VARIANTS]
    rows = json.loads(kept.read_text())
    every_step, diloco, four_bits = rows
    parameters = every_step["parameters"]
    # 9 steps: gradients 9 times; rounds of 2 steps 4 times, and the last one. In each round a header takes
    # a slot.
    headers = 5 * SLOT_BYTES
    assert every_step["bytes"] == pytest.approx(9 * 4 * parameters, rel=0.05)
    assert diloco["bytes"] == pytest.approx(5 * 4 * parameters + headers, rel=0.05)
    assert four_bits["bytes"] == pytest.approx(5 * 4 * parameters * 0.133 + headers, rel=0.15)
    assert all(row["curve"][0] == every_step["curve"][0] for row in rows)  # all begin alike
    assert all(row["curve"][-1][2] < row["curve"][0][2] for row in rows)
    assert (tmp_path / "tiny.png").stat().st_size > 1000

    # Nothing is run again but what is missing, and that repeats to the bit.
    kept.write_text(json.dumps([every_step, four_bits]))
    main(arguments)
    again = json.loads(kept.read_text())
    assert again[:2] == [every_step, four_bits]
    assert again[2]["losses"] == diloco["losses"]
