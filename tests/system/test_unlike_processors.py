"""Parties on unlike processors hold the same bits after each round; each is a process with other settings.

``ATEN_CPU_CAPABILITY``, ``MKL_CBWR`` and ``ONEDNN_MAX_CPU_ISA`` make torch, MKL and oneDNN compute as they do
on older processors: without a fused multiply-add, in narrower vectors, in another order of summands.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from paths import SCRIPTS, search_path

OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
MIDDLE = {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}
THIS = {"OMP_NUM_THREADS": "3"}

pytestmark = [pytest.mark.torchrun, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What three parties held after each round of each case."""
    pytest.importorskip("cryptography")
    from pellm_lightning.comm.keys import make_key

    out = tmp_path_factory.mktemp("unlike")
    middle = dict(MIDDLE)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):  # torch believes what it is told
        middle["ATEN_CPU_CAPABILITY"] = "avx2"
    for party in range(3):
        make_key(out, str(party))
    own = {name: value for name, value in os.environ.items() if name not in OLD}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPTS / "unlike.py"), str(out), str(party), "3"],
            env=own | {"PYTHONPATH": search_path(), "OMP_WAIT_POLICY": "passive"} | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for party, settings in enumerate((THIS, OLD, middle))
    ]
    try:
        said = [process.communicate(timeout=350)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(said)[-6000:]
    assert "other bits" not in "".join(said), "nothing had to be handed over"
    return [json.loads((out / f"{party}.json").read_text()) for party in range(3)]


def test_the_settings_make_unlike_processors(parties: list[dict[str, Any]]) -> None:
    """Else the others show nothing. Elsewhere than on x86 the settings may do nothing."""
    this, old, _ = (party["settings"] for party in parties)
    if this["capability"] in ("AVX2", "AVX512"):
        assert old["capability"] in ("DEFAULT", "NO AVX")  # as newer and older torch call it
        assert this["fused"] != old["fused"]
        assert this["linear algebra"] != old["linear algebra"]


@pytest.mark.parametrize(
    "kind", ["rule", "thin", "outer", "exchange", "masked", "quantized", "auxiliary", "private"]
)
def test_all_hold_the_same_bits_after_each_round(parties: list[dict[str, Any]], kind: str) -> None:
    """Parameters, frozen weights, the global vector, the state of the outer optimizer, the clipping norm."""
    first, *others = (party["held"] for party in parties)
    found = [name for name in first if name.startswith(kind)]
    assert found
    for name in found:
        for number, held in enumerate(first[name]):
            for other in others:
                assert other[name][number] == held, f"{name}, round {number}"
