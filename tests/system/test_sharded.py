"""Parties in shards: FSDP2, tensor parallelism, meshes of both, FSDP1; real processes, against DDP.

One launch of four processes answers all tests; see tests/scripts/sharded.py.
"""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import torchrun
from party_threads import fit_parties
from paths import SCRIPTS
from safetensors.torch import load_file
from sharded_module import ShardedModule

from pellm_lightning.cli.export import export
from pellm_lightning.comm.keys import make_key
from pellm_lightning.trainer.party_parameters.choice import OLDEST_TORCH

sys.path.insert(0, str(SCRIPTS))

pytestmark = [
    pytest.mark.torchrun,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.__version__ < OLDEST_TORCH, reason="refused with an older torch"),
]

PARTS = ("documented", "refused", "robust", "uneven", "mesh", "resumed", "matrix", "fsdp1", "loop", "jobs")

# What differs is the rounding of means and sums, 2^-24 of numbers below 2, through 8 steps of lr 0.02.
CLOSE = {"rtol": 0, "atol": 5e-6}


class Launch:
    """The answers of the four processes, by part of the script."""

    def __init__(self, out: Path) -> None:
        self.out = out
        for name in "012":
            make_key(out / "keys", name)
        done = torchrun(4, [str(SCRIPTS / "sharded.py"), str(out), *PARTS], out, timeout_s=280)
        self.returncode = done.returncode
        # What a process died of stands far above the launcher's own words.
        _, found, stack = done.stdout.partition("Fatal Python error")
        self.output = (found + stack)[:12_000] if found else done.stdout[-6000:]

    def __getitem__(self, part: str) -> list[Any]:
        processes = 5 if part == "jobs" else 4
        paths = [self.out / f"{part}-{rank}.pt" for rank in range(processes)]
        tracebacks = [p.read_text() for p in self.out.glob(f"{part}-?.txt")]
        missing = [path.name for path in paths if not path.exists()]
        assert not missing, f"{missing} missing:\n{''.join(tracebacks) or self.output}"
        return [torch.load(path) for path in paths]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return Launch(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The script as a module of this process, for parties of one process as threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sharded", str(tmp_path_factory.mktemp("single"))])
        patch.setenv("RANK", "0")
        import sharded
    return sharded


def single_parties(script: Any, count: int, **settings: Any) -> list[dict[str, Any]]:
    """Parties of one process, on the same global batches."""

    class Single:
        size, rank, key = 1, 0, "single"
        trainer, loader = script.Parties.trainer, script.Parties.loader

        def __init__(self, party: int, make: Callable[..., Any]) -> None:
            self.party = party
            self.federated = lambda name, **arguments: make(**arguments)

    return fit_parties(count, lambda party, make: script.fit(Single(party, make), "single", **settings))


def assert_all_same(answers: list[Any]) -> None:
    """The processes of all parties hold the same bits."""
    assert all(torch.equal(answers[0]["vector"], other["vector"]) for other in answers)


def assert_same_rounds(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["steps"] == other["steps"]
    assert one["weights"] == other["weights"], "samples count once per batch"
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)


# ---- two parties of two processes


TO_THE_BIT = (
    *("fp32", "bf16-true", "bf16-mixed", "recomputed", "compiled", "offloaded", "full", "full SGD"),
    *("overlap", "fragments", "reset", "mean", "frozen A", "alternating", "share A", "power", "balanced"),
    *("ranks", "quantised", "private"),
)


@pytest.mark.parametrize("case", TO_THE_BIT)
def test_fsdp2_equals_ddp_to_the_bit(launch: Launch, case: str) -> None:
    answers = [answer[case] for answer in launch["matrix"]]
    if case != "share A":  # whose B stays with its party
        assert_all_same([answer["fsdp"] for answer in answers])
    for answer in answers:
        assert torch.equal(answer["fsdp"]["vector"], answer["ddp"]["vector"])
        assert_same_rounds(answer["fsdp"], answer["ddp"])
        assert answer["fsdp"]["deviation"] == answer["ddp"]["deviation"]


@pytest.mark.parametrize("case", ["clipped", "accumulated"])
def test_fsdp2_is_close_to_ddp_where_it_sums_in_another_order(launch: Launch, case: str) -> None:
    for answer in launch["matrix"]:
        torch.testing.assert_close(answer[case]["fsdp"]["vector"], answer[case]["ddp"]["vector"], **CLOSE)
        assert_same_rounds(answer[case]["fsdp"], answer[case]["ddp"])


@pytest.mark.parametrize("case", ["fp32", "full", "alternating", "overlap", "recomputed"])
def test_tensor_parallel_equals_ddp(launch: Launch, case: str) -> None:
    answers = [answer[case] for answer in launch["matrix"]]
    assert_all_same([answer["tp"] for answer in answers])
    for answer in answers:
        torch.testing.assert_close(answer["tp"]["vector"], answer["ddp"]["vector"], **CLOSE)
        assert_same_rounds(answer["tp"], answer["ddp"])


def test_tensor_parallel_in_half_precision(launch: Launch) -> None:
    answers = [answer["bf16-true"] for answer in launch["matrix"]]
    assert_all_same([answer["tp"] for answer in answers])
    for answer in answers:
        assert answer["tp"]["weights"] == answer["ddp"]["weights"]
        # Steps of 0.02 whose sign may differ where a gradient is small; values have eight bits.
        difference = (answer["tp"]["vector"] - answer["ddp"]["vector"]).abs()
        assert difference.mean() < 0.01


def test_two_kinds_of_parties_in_one_federation(launch: Launch, script: Any) -> None:
    answers = [answer["fp32"]["mixed"] for answer in launch["matrix"]]
    assert_all_same(answers)
    singles = single_parties(script, 2)
    for rank, answer in enumerate(answers):
        torch.testing.assert_close(answer["vector"], singles[rank // 2]["vector"], **CLOSE)
        assert_same_rounds(answer, singles[rank // 2])


@pytest.mark.parametrize(
    "case", ["fsdp", "tp", "fsdp distributed", "tp distributed", "fsdp overlap", "fsdp adapter", "tp adapter"]
)
def test_resuming_within_a_round_is_exact(launch: Launch, case: str) -> None:
    for whole, resumed in (answer[case] for answer in launch["resumed"]):
        assert torch.equal(whole["vector"], resumed["vector"])
        # Rounds after steps 3, 6 and 8; resumed after step 4, when with the overlap one is under way.
        assert resumed["weights"] == whole["weights"][-len(resumed["weights"]) :]
        assert len(resumed["weights"]) == 2 + (case == "fsdp overlap")


def test_a_checkpoint_of_shards_is_exported(launch: Launch, tmp_path: Path) -> None:
    answer = launch["resumed"][0]["fsdp adapter"][0]
    module = ShardedModule(party=0)
    module.configure_model()
    checkpoint = Path(answer["dirpath"], "step=8.ckpt")
    export(checkpoint, tmp_path / "adapter", module=module)
    saved = torch.load(checkpoint)["state_dict"]
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lora = {name: x for name, x in exported.items() if "lora_" in name}
    assert len(lora) == 4
    for name, x in lora.items():
        assert torch.equal(x, saved[f"net.{name.replace('.weight', '.default.weight')}"])


def test_the_script_of_the_page_runs(launch: Launch) -> None:
    answers = launch["documented"]
    assert_all_same(answers)
    # 32 samples a party, 4 a process: rounds of four steps of 8 samples, and each party counts.
    assert all(answer["rounds"] == [(2, 32.0), (2, 32.0)] for answer in answers)


# ---- what is refused


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("spans", "The strategy ModelParallelStrategy spans 4 processes, but a party has 1 (4 parties)"),
        (
            "devices",
            "A party has 2 process(es) (2 parties in the federation), but the Trainer has devices=4",
        ),
        ("base", "its base weight lies in shards over the party's processes"),
        ("drift", "SCAFFOLD needs whole parameters in each process, and ModelParallelStrategy keeps them in"),
        ("averaged", "EMAWeightAveraging needs whole parameters in each process"),
        (
            "left out",
            "a distributed checkpoint cannot be loaded in part. Use ModelParallelStrategy(save_dist",
        ),
        (
            "differs",
            "The frozen base model of party 1 is not that of party 0: the first tensor that differs",
        ),
    ],
)
def test_what_cannot_be_federated_is_refused_by_all_at_once(launch: Launch, case: str, words: str) -> None:
    for error, seconds in (answer[case] for answer in launch["refused"]):
        assert words in error
        assert seconds < 60, "timeouts are 600 s"


def test_after_a_refusal_a_fit_works(launch: Launch) -> None:
    assert_all_same([answer["after"] for answer in launch["refused"]])


# ---- parties of other sizes


@pytest.mark.parametrize("case", ["median", "trimmed", "bound", "secure"])
def test_three_parties_of_which_one_is_sharded(launch: Launch, case: str) -> None:
    answers = [answer[case] for answer in launch["robust"]]
    assert_all_same([answer["fsdp"] for answer in answers])
    for answer in answers:
        assert torch.equal(answer["fsdp"]["vector"], answer["ddp"]["vector"])


def test_uneven_shards_over_three_processes(launch: Launch) -> None:
    answers = launch["uneven"]
    assert_all_same([answer["fsdp"] for answer in answers])
    for answer in answers:
        torch.testing.assert_close(answer["fsdp"]["vector"], answer["ddp"]["vector"], **CLOSE)
        assert_same_rounds(answer["fsdp"], answer["ddp"])


@pytest.mark.parametrize("case", ["fp32", "full"])
def test_a_mesh_of_two_by_two_equals_one_process(launch: Launch, script: Any, case: str) -> None:
    answers = [answer[case] for answer in launch["mesh"]]
    assert_all_same(answers)
    (single,) = single_parties(script, 1, **script.MATRIX[case])
    torch.testing.assert_close(answers[0]["vector"], single["vector"], **CLOSE)
    assert_same_rounds(answers[0], single)


def test_a_mesh_resumes_to_the_bit(launch: Launch) -> None:
    for answer in launch["mesh"]:
        assert torch.equal(answer["whole"]["vector"], answer["resumed"]["vector"])
        assert torch.isfinite(answer["bf16-true"]["vector"]).all()


def test_separate_jobs_of_unlike_kinds_of_which_one_fails_and_one_is_killed(launch: Launch) -> None:
    """Party a has two processes with FSDP2, b two in tensor parallel, c is a single one."""
    answers = launch["jobs"]
    assert_all_same(answers)
    assert answers[0]["codes"] == [-signal.SIGKILL, 0]
    for answer in answers[:2]:
        assert "disk full" in answer["failed"][0]
    for answer in (*answers[:2], answers[4]):
        assert (3, 1.0) in [(active, weight) for _, active, weight in answer["rounds"]], "it counts again"
    for answer in answers[2:4]:
        active = [active for _, active, _ in answer["rounds"]]
        # Who comes back loads its state in a round, a in round 1 and c in 3 or 4, and counts from the next.
        assert active[:4] == [3, 2, 3, 2]
        assert active[5] == 3


# ---- without Lightning


def test_a_loop_of_ones_own_in_shards_equals_ddp(launch: Launch) -> None:
    answers = launch["loop"]
    assert_all_same([answer["fsdp"] for answer in answers])
    for answer in answers:
        assert torch.equal(answer["fsdp"]["vector"], answer["ddp"]["vector"])
        torch.testing.assert_close(answer["fsdp1"]["vector"], answer["ddp"]["vector"], **CLOSE)
        for kind in ("fsdp", "fsdp1", "ddp"):
            assert answer[kind]["weights"] == [12.0, 12.0, 6.0]


def test_fsdp1_reads_and_writes_what_its_optimizer_steps(launch: Launch) -> None:
    leader = launch["fsdp1"][0]
    assert leader["kind"] == "FSDP1Parameters"
    ours, theirs = leader["digests"]
    assert ours == theirs
    assert len(ours) == 2
    for moment in ("written", "stepped"):
        torch.testing.assert_close(*leader[moment], **CLOSE)


def test_zero_reads_and_writes_masters_and_parameters(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    done = torchrun(4, [str(SCRIPTS / "sharded.py"), str(tmp_path), "zero"], tmp_path, program=sys.executable)
    assert done.returncode == 0, done.stdout[-6000:]
    answers = [torch.load(tmp_path / f"zero-{rank}.pt") for rank in range(4)]
    for case, answer in answers[0].items():
        kept = [other[case]["federated"] for other in answers]
        assert kept[0]["0.weight"].shape == (12, 8)
        assert all(torch.equal(x, other[name]) for other in kept for name, x in kept[0].items())
        assert answer["kind"] == "ZeroParameters"
        assert torch.equal(answer["written"], answer["wanted"])
        # What the module computes next is of what was written; in bf16 of eight bits of it.
        close = {"rtol": 0.02, "atol": 0.05} if "bf16" in case else CLOSE
        torch.testing.assert_close(*answer["forward"], **close)
        # The optimizer has gone on from there by a step of lr 0.05; the round had moved values by 0.25.
        moved = (answer["stepped"] - answer["wanted"]).abs()
        assert 0.01 < moved.max() < 0.11


def test_the_launch_succeeded(launch: Launch) -> None:
    assert launch.returncode == 0, launch.output
