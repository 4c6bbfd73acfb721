"""The doctor: each finding by itself, parties as threads, separate jobs, and one real launch."""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from certificates import tls_of
from launch import torchrun
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lora_module import Tuned
from party_threads import Classifier, in_threads, quiet_trainer, run_parties
from secure_exchange import masked
from small_module import LittleData, LittleModule
from torch.nn.utils import parameters_to_vector

from pellm_lightning import FederatedAveraging, FederatedCLI, Overlap, Parameters, SeparateJobs
from pellm_lightning.aggregation import ResidualMean, ShareA, Stacking, lora_modules
from pellm_lightning.callbacks.drift import SCAFFOLD
from pellm_lightning.cli.doctor import command, show
from pellm_lightning.cli.doctor.checks import Finding, Seen, findings
from pellm_lightning.cli.doctor.command import DryRun, examine, measure
from pellm_lightning.cli.doctor.facts import (
    UNREADABLE_FACTS,
    UNREADABLE_MEASURED,
    Facts,
    Measured,
    Rehearsal,
    read,
)
from pellm_lightning.comm.rendezvous.server import RendezvousServer
from pellm_lightning.comm.topology import Topology
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.engine.compatibility import PROTOCOL
from pellm_lightning.exchange import Cast, Quantized
from pellm_lightning.privacy import GaussianMechanism
from pellm_lightning.tensors.selection import select

ROSTER = ("a", "b", "c")
VERSIONS = {"python": "3.11.9", "torch": "2.13.0", "pellm-lightning": "0.1"}

# ---- findings, one by one


def shown(**changes: Any) -> dict[str, Any]:
    """A passport."""
    return {
        "protocol": PROTOCOL,
        "schema": [["w", "v"], ["float32 of shape [2, 3]", "float32 of shape [4]"]],
        "lora": {},
        "ranks_may_differ": False,
        "config": {"exchange": "Plain()", "every_n_steps": 5},
        "base": {"x": "12", "y": "34"},
        "adapters": {},
        "round": 0,
        "checksum": None,
        "files": [],
    } | changes


def facts(name: str, **changes: Any) -> Facts:
    return Facts(
        **{
            "host": f"host-{name}",
            "versions": VERSIONS,
            "device": "cuda:0 H100",
            "accelerator": f"host-{name}:GPU-0",
            "size_bytes": 40,
            "parameters": 10,
            "of_parameters": 100,
            "party_spec": shown(files=[f"host-{name}:/runs"]),
        }
        | changes
    )


MEASURED = Measured(0.002, 5e7, 8 << 20, (0.5, 0.25), 40)
HEALTHY = Seen(
    ROSTER,
    {name: facts(name) for name in ROSTER},
    clocks={"a": 0.0, "b": 0.2, "c": -0.3},
    measured=dict.fromkeys(ROSTER, MEASURED),
)


def with_c(**changes: Any) -> Seen:
    """A healthy launch but for party c."""
    return replace(HEALTHY, facts={**HEALTHY.facts, "c": facts("c", **changes)})


def test_of_a_healthy_launch_all_is_told_and_good() -> None:
    found = findings(HEALTHY)
    assert {finding.level for finding in found} == {"ok"}
    told = {finding.topic: finding.says for finding in found}
    assert told == {
        "parties": "All 3 parties are there, on 3 hosts.",
        "versions": "The same at all 3 parties (torch 2.13.0).",
        "base model": "The same at all 3 parties, every value of 2 frozen tensors.",
        "settings": "The same at all 3 parties.",
        "parameters": "The same at all 3 parties: 10 of 100 leave a party (10 %).",
        "files": "Each party writes where no other writes.",
        "devices": "3 accelerators, none of them shared.",
        "clocks": "Less than 0.5 s apart.",
        # 8 MiB are 8.39 MB.
        "network": "A sum over all parties takes 2 ms, and 50 MB a second (of 8.39 MB).",
        # The first round also makes what later ones have.
        "round": "Takes 250 ms and sends 40 B a party: 2 rounds made, of which nothing is kept.",
    }


OTHER_SETTINGS = shown(config={"exchange": "Cast('bfloat16')", "every_n_steps": 7})
ODD = {
    "a different seed": ({"base": {"x": "12", "y": "99"}}, "base model", "first tensor that differs is 'y'"),
    "another shape": (
        {"schema": [["w", "v"], ["float32 of shape [2, 9]", "float32 of shape [4]"]]},
        "parameters",
        r"'w' is float32 of shape \[2, 3\] at party a but float32 of shape \[2, 9\]",
    ),
    "a parameter less": (
        {"schema": [["w"], ["float32 of shape [2, 3]"]]},
        "parameters",
        "Party a trains parameter 'v'",
    ),
    "another protocol": ({"protocol": PROTOCOL + 1}, "protocol", "Install the same version"),
    "no base compared": (
        {"base": None},
        "base model",
        "Party c has check_frozen=False. The others compare it",
    ),
    "another round": ({"round": 4}, "resume", "Resume all parties from checkpoints of the same round"),
    "nonsense": ({"schema": 5}, "protocol", "cannot read. Install the same version"),
    "another's files": ({"files": ["host-a:/runs"]}, "files", "would both write to 'host-a:/runs'"),
}
CASES: dict[str, tuple[Seen, str, str, str]] = {
    name: (with_c(party_spec=shown(**changes)), "error", summary, says)
    for name, (changes, summary, says) in ODD.items()
} | {
    "missing": (
        replace(HEALTHY, facts={"a": facts("a"), "b": facts("b")}, measured={}, clocks={}, wait_s=7),
        "error",
        "parties",
        r"Party c did not come within 7 s\. See that it was started",
    ),
    "silent": (
        replace(HEALTHY, facts={"a": facts("a"), "b": facts("b")}, silent=["c"], measured={}, wait_s=7),
        "error",
        "parties",
        "Party c came, but did not read its data and build its model within 7 s",
    ),
    "broken": (
        with_c(trouble=("no model 'm'",), party_spec=None),
        "error",
        "fit",
        "c cannot begin: no model 'm'.",
    ),
    "no data": (
        with_c(doubts=("no file",)),
        "warning",
        "data",
        "Party c cannot read the data: no file. If prep",
    ),
    "another torch": (
        with_c(versions=VERSIONS | {"torch": "2.9.0"}),
        "warning",
        "versions",
        r"torch is 2\.13\.0 at Parties a, b, 2\.9\.0 at Party c\. Install the same .* 'torch==",
    ),
    "no peft": (
        with_c(versions=VERSIONS | {"peft": "0.20"}),
        "warning",
        "versions",
        "peft is none at Parties a, b, 0.20 at Party c",
    ),
    "another of ours": (
        with_c(versions=VERSIONS | {"pellm-lightning": "9"}),
        "error",
        "versions",
        "is 0.1 at",
    ),
    "a shared GPU": (
        with_c(accelerator="host-a:GPU-0"),
        "warning",
        "devices",
        "Parties a, c would all train on host-a:GPU-0. Give each its own",
    ),
    "uneven parties": (with_c(processes=4), "warning", "devices", "a: 1, b: 1, c: 4.*every_n_seconds"),
    "a clock": (
        replace(HEALTHY, clocks={"a": 0.0, "b": 0.1, "c": -3.4}),
        "warning",
        "clocks",
        r"The clock of party c is 3\.4 s behind\. Let NTP",
    ),
    "the first clock": (
        replace(HEALTHY, clocks={"a": 0.0, "b": -3.5, "c": -3.4}),
        "warning",
        "clocks",
        r"The clock of party a is 3\.4 s ahead",
    ),
    "lost in between": (
        replace(HEALTHY, measured={"a": MEASURED, "b": MEASURED}),
        "error",
        "network",
        "Party c was lost while",
    ),
    "no connection": (
        replace(HEALTHY, measured={**HEALTHY.measured, "c": Measured(trouble="no route")}),
        "error",
        "network",
        "Party c, measuring with the others: no route.",
    ),
    "too slow": (
        # 40 bytes at 4 bytes a second.
        replace(HEALTHY, measured=dict.fromkeys(ROSTER, replace(MEASURED, bytes_per_s=4.0, rounds_s=()))),
        "warning",
        "round",
        r"would take about 10\.0 s uncompressed, too long to make one here",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_found_and_nothing_else(name: str) -> None:
    seen, level, summary, says = CASES[name]
    bad = [finding for finding in findings(seen) if finding.level != "ok"]
    if not seen.measured:
        assert bad.pop() == Finding("warning", "network", "Not measured: that needs all parties.")
    assert [(finding.level, finding.topic) for finding in bad] == [(level, summary)]
    assert re.search(says, bad[0].says)
    good = {finding.topic for finding in findings(seen) if finding.level == "ok"}
    assert summary not in good


def test_all_differences_are_told_not_only_the_first() -> None:
    schema = [[f"w{i}" for i in range(3)], ["float32 of shape [1]"] * 3]
    others = {"config": OTHER_SETTINGS["config"], "base": {"x": "0", "y": "0"}, "schema": schema}
    told = [
        (finding.topic, finding.says)
        for finding in findings(with_c(party_spec=shown(**others)))
        if finding.level == "error"
    ]
    assert [summary for summary, _ in told] == ["settings", "settings", "parameters", "base model"]
    assert "exchange='Plain()'" in told[0][1]
    assert "every_n_steps=5" in told[1][1]
    # w0, w1 and w2 are there only, w and v here only.
    assert told[2][1].endswith("(4 more like this.)")
    assert "(2 of 2 differ)" in told[3][1]


def test_with_errors_the_seconds_of_a_round_are_an_estimate() -> None:
    seen = with_c(party_spec=shown(base={}))
    seen = replace(seen, measured=dict.fromkeys(ROSTER, replace(MEASURED, bytes_per_s=400.0, rounds_s=())))
    (about_round,) = [finding for finding in findings(seen) if finding.topic == "round"]
    assert about_round.level == "ok"
    assert about_round.says.endswith(
        "take about 100 ms uncompressed; none was made, since the parties must be mended first."
    )


def test_pairs_that_need_the_relay_are_named() -> None:
    ways = {"a": ("b",), "b": ("a",), "c": ()}
    relayed = {name: replace(MEASURED, relayed=peers) for name, peers in ways.items()}
    (network,) = [f.says for f in findings(replace(HEALTHY, measured=relayed)) if f.topic == "network"]
    assert network.endswith("Connected by the relay: a-b. Connected directly: a-c, b-c.")
    assert not any("relay" in found.says for found in findings(HEALTHY))


def test_what_a_party_of_another_version_tells() -> None:
    assert "same version" in read({"host": "x"}, UNREADABLE_FACTS).trouble[0]
    assert "same version" in read(["?"], UNREADABLE_FACTS).trouble[0]
    assert "same version" in str(read({}, UNREADABLE_MEASURED).trouble)
    more = json.loads(json.dumps(vars(facts("a")))) | {"something": "new"}
    assert read(more, UNREADABLE_FACTS) == facts("a")


# ---- the whole, parties as threads


def rehearsal(
    root: Path, seed: int = 0, module: Any = None, callbacks: tuple[Any, ...] = (), **arguments: Any
) -> Rehearsal:
    callback = FederatedAveraging(**arguments)
    trainer = quiet_trainer(root, [callback, *callbacks])
    module = module or Classifier(seed)
    if callback.overlap.fragments > 1:  # they are groups of layers
        module.base.requires_grad_(True)
    return Rehearsal(trainer, module, None, callback)


def visits(
    make: Callable[[int], Rehearsal | None],
    parties: int = 3,
    absent: tuple[int, ...] = (),
    wait_s: float = 20.0,
    store: dist.Store | None = None,
    ahead_s: tuple[float, ...] = (0.0, 0.0, 0.0),
) -> list[Seen]:
    """What each party of a launch has seen."""
    store, results = store or dist.HashStore(), {}

    def party(index: int) -> None:
        visit = DryRun(None, Topology(index, parties), wait_s)
        visit.now = lambda: time.time() + ahead_s[index]
        visit.connect(store)
        patient = make(index)
        results[index] = visit.look(patient, None if patient else ValueError("model='m' cannot be loaded"))
        visit.close()

    in_threads([lambda i=i: party(i) for i in range(parties) if i not in absent])
    return [results[index] for index in sorted(results)]


def bad(seen: Seen) -> list[tuple[str, str]]:
    return [(finding.level, finding.topic) for finding in findings(seen) if finding.level != "ok"]


SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "cast": lambda: {"exchange": Cast("bfloat16")},
    "quantized": lambda: {"exchange": Quantized(bits=8)},
    "private": lambda: {
        "privacy": GaussianMechanism(max_norm=1.0, noise_multiplier=1.0, distributed=False),
        "weighting": "uniform",
    },
    "fragments": lambda: {"overlap": Overlap(fragments=2), "every_n_steps": 4},
    "masked": lambda: {"exchange": masked()},
    "stacking": lambda: {"aggregation": Stacking(), "module": Tuned(0)},
    "residual mean": lambda: {"aggregation": ResidualMean(), "module": Tuned(0)},
}


def trained(patient: Rehearsal) -> torch.Tensor:
    return parameters_to_vector(p for p in patient.module.parameters() if p.requires_grad).detach().clone()


@pytest.mark.parametrize("name", SETTINGS)
def test_rounds_are_as_the_fit_s(name: str, tmp_path: Path) -> None:
    patients = [rehearsal(tmp_path, seed, **SETTINGS[name]()) for seed in range(3)]
    before = [trained(patient) for patient in patients]
    everyones = visits(lambda index: patients[index])
    for seen in everyones:
        assert bad(seen) == []
        assert findings(seen) == findings(everyones[0])
        assert [len(measured.rounds_s) for measured in seen.measured.values()] == [2] * 3
    for patient, vector in zip(patients, before, strict=True):
        assert torch.equal(trained(patient), vector), "a rehearsed round wrote into the module"
    assert not list(tmp_path.iterdir())


def test_a_rehearsed_round_sends_what_a_round_sends(tmp_path: Path) -> None:
    def act(federation: Any) -> int:
        module = Classifier(federation.party)
        aggregator = Aggregator(federation, select(module), lora=lora_modules(module))
        aggregator.start()
        sent = [aggregator.step(1.0).bytes_sent for _ in range(2)][-1]
        list(aggregator.drain())
        return sent

    (seen, _) = visits(lambda index: rehearsal(tmp_path, index), parties=2)
    assert [measured.round_bytes for measured in seen.measured.values()] == run_parties(2, act)


def test_only_what_leaves_a_party_is_counted(tmp_path: Path) -> None:
    (seen, _) = visits(lambda _: rehearsal(tmp_path, module=Tuned(0), aggregation=ShareA()), parties=2)
    (told,) = [finding.says for finding in findings(seen) if finding.topic == "parameters"]
    # A of rank 2 over 8 and over 16 inputs; B and the head stay at home.
    assert f": {2 * 8 + 2 * 16} of {sum(p.numel() for p in Tuned(0).parameters())} leave" in told


def test_a_drift_correction_s_vector_crosses_too(tmp_path: Path, over_gloo: None) -> None:
    plain = visits(lambda index: rehearsal(tmp_path, index), parties=2)[0].measured["0"]
    both = visits(lambda index: rehearsal(tmp_path, index, callbacks=(SCAFFOLD(),)), parties=2)[0].measured[
        "0"
    ]
    assert both.trouble is None
    # 51 float32 more.
    assert both.round_bytes == plain.round_bytes + 4 * 51


def test_a_base_and_settings_that_differ_are_found_by_all(tmp_path: Path) -> None:
    def make(index: int) -> Rehearsal:
        patient = rehearsal(tmp_path, every_n_steps=5 + index // 2)
        if index == 1:
            with torch.no_grad():
                patient.module.base.bias += 1
        return patient

    for seen in visits(make):
        assert sorted(bad(seen)) == [("error", "base model"), ("error", "settings")]
        assert all(not measured.rounds_s and measured.bytes_per_s for measured in seen.measured.values())


def test_a_party_that_does_not_come_is_told_of_in_time(tmp_path: Path) -> None:
    for seen in visits(lambda index: rehearsal(tmp_path), absent=(1,), wait_s=0.5):
        assert bad(seen) == [("error", "parties"), ("warning", "network")]
        assert list(seen.facts) == ["0", "2"]


def test_a_party_of_an_earlier_check_is_not_there(tmp_path: Path) -> None:
    store = dist.HashStore()
    for absent, wait_s in (((), 20.0), ((1,), 0.5), ((), 20.0)):
        for seen in visits(lambda _: rehearsal(tmp_path), absent=absent, wait_s=wait_s, store=store):
            assert list(seen.facts) == [str(index) for index in range(3) if index not in absent]


def test_a_party_that_is_slow_to_build_its_model_is_silent(tmp_path: Path) -> None:
    everyone_else_is_done = threading.Event()

    def make(index: int) -> Rehearsal:
        if index == 2:
            everyone_else_is_done.wait(30)
        return rehearsal(tmp_path)

    store, seen = dist.HashStore(), []

    def others() -> None:
        seen.extend(visits(make, absent=(2,), wait_s=2.0, store=store))
        everyone_else_is_done.set()

    in_threads([others, lambda: visits(make, absent=(0, 1), wait_s=0.5, store=store)])
    for each in seen:
        assert (list(each.facts), each.silent) == (["0", "1"], ["2"])
        assert bad(each) == [("error", "parties"), ("warning", "network")]


def test_a_clock_that_is_ahead_is_measured(tmp_path: Path) -> None:
    for seen in visits(lambda _: rehearsal(tmp_path), ahead_s=(0.0, 60.0, 0.0)):
        first = seen.clocks["0"]
        ahead = {name: clock - first for name, clock in seen.clocks.items()}
        assert ahead == pytest.approx({"0": 0, "1": 60, "2": 0}, abs=0.5)
        assert bad(seen) == [("warning", "clocks")]


def test_a_party_that_cannot_build_its_model_tells_the_others(tmp_path: Path) -> None:
    class Broken(Classifier):
        def configure_model(self) -> None:
            raise OSError("no such file: base.safetensors")

    def make(index: int) -> Rehearsal | None:
        return {0: rehearsal(tmp_path), 1: rehearsal(tmp_path, module=Broken()), 2: None}[index]

    for seen in visits(make):
        found = [finding.says for finding in findings(seen) if finding.level == "error"]
        assert found == [
            "Party 1 cannot begin: OSError: no such file: base.safetensors.",
            "Party 2 cannot begin: model='m' cannot be loaded.",
        ]


def test_what_a_fit_would_refuse_is_found(tmp_path: Path) -> None:
    (seen,) = visits(lambda _: rehearsal(tmp_path, parameters=Parameters(include=["*lora*"])), parties=1)
    assert bad(seen) == [("warning", "parties"), ("error", "fit")]
    assert "'*lora*' matches none" in seen.facts["0"].trouble[0]


def test_a_round_that_would_take_long_is_not_made(tmp_path: Path) -> None:
    measured = run_parties(2, lambda f: measure(f, rehearsal(tmp_path), patience_s=0.0))
    assert [m.rounds_s for m in measured] == [(), ()]


def test_on_a_slow_network_large_sums_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LONG_S", 0.0)
    measured = run_parties(2, lambda f: measure(f, None, patience_s=1.0))
    assert [m.summed_bytes for m in measured] == [command.SIZES[0]] * 2


# ---- separate jobs


@pytest.fixture
def meeting_place() -> Iterator[str]:
    with RendezvousServer("127.0.0.1", 0, roster=ROSTER, tls=tls_of("rendezvous")) as server:
        yield f"tcp://{server.address}"


def jobs(
    address: str, root: Path, names: tuple[str, ...], wait_s: float, **arguments: Any
) -> dict[str, bool]:
    """Whether each job's doctor was content."""
    results: dict[str, bool] = {}

    def party(name: str) -> None:
        patient = rehearsal(
            root, jobs=SeparateJobs(address, name, ROSTER, tls=tls_of(name)), **arguments.get(name, {})
        )
        job = patient.callback.jobs
        assert isinstance(job, SeparateJobs)
        results[name] = examine(job, job.topology({}), patient, wait_s=wait_s)

    in_threads([lambda name=name: party(name) for name in names])
    return results


def test_separate_jobs_over_tls(
    meeting_place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs(meeting_place, tmp_path, ROSTER, 20) == dict.fromkeys(ROSTER, True)
    told = capsys.readouterr().out
    assert told.count("0 errors, 0 warnings: ready to fit.") == 3  # each has a terminal of its own
    assert told.count("2 rounds made, of which nothing is kept") == 3
    # Again at the same rendezvous, with one party of other settings: what was said before does no harm.
    found = jobs(meeting_place, tmp_path, ROSTER, 20, b={"every_n_steps": 9})
    assert found == dict.fromkeys(ROSTER, False)
    assert "every_n_steps=None, party b has every_n_steps=9" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_a_fit_of_separate_jobs_would_refuse_is_not_the_network_s_fault(
    meeting_place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    each = {name: {"module": Tuned(0), "aggregation": Stacking()} for name in ROSTER}
    assert jobs(meeting_place, tmp_path, ROSTER, 20, **each) == dict.fromkeys(ROSTER, False)
    told = capsys.readouterr().out
    assert (
        told.count("error    fit: Parties a, b, c cannot begin: Stacking(seed=0) writes into the froz") == 3
    )
    assert not re.search("^(warning|error) +network", told, re.MULTILINE)


def test_a_job_that_is_missing_is_named(
    meeting_place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs(meeting_place, tmp_path, ("a", "c"), 0.7) == {"a": False, "c": False}
    assert "Party b did not come within 0.7 s" in capsys.readouterr().out


def test_a_rendezvous_that_refuses_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(job: SeparateJobs) -> None:
        raise dist.DistNetworkError("The rendezvous at h:1 is out of reach.")

    monkeypatch.setattr(SeparateJobs, "connect", refuse)
    assert jobs("tcp://h:1", tmp_path, ("a",), 1) == {"a": False}
    assert (
        "error    rendezvous: DistNetworkError: The rendezvous at h:1 is out of reach."
        in capsys.readouterr().out
    )


# ---- the command


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> None:
        quiet = ["--seed_everything=false", "--trainer.accelerator=cpu", "--trainer.devices=1"]
        monkeypatch.setattr(sys, "argv", ["federate", "doctor", *quiet, *words])
        FederatedCLI(LittleModule, LittleData)

    yield run
    rank_zero_only.rank = 0


ALONE = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@ALONE
def test_the_command_alone(doctor: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor(
        "--wait_s=5", "--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=runs"
    )
    told = capsys.readouterr().out
    assert "This is a federation of one party." in told
    assert told.endswith("0 errors, 1 warning: ready to fit.\n")
    assert not list(tmp_path.iterdir()), "the doctor wrote a file"
    with pytest.raises(SystemExit) as ended:
        doctor("--federated.parameters.exclude=['*']")
    assert ended.value.code == 1


@ALONE
def test_what_cannot_be_built_is_a_finding(
    doctor: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no such model")

    monkeypatch.setattr(LittleModule, "__init__", fail)
    with pytest.raises(SystemExit) as ended:
        doctor()
    assert ended.value.code == 1
    assert "Party 0 cannot begin: OSError: no such model" in capsys.readouterr().out


def test_in_a_terminal_tables_fit_its_width(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    seen, *_ = CASES["missing"]
    show._tables(seen, findings(seen), width=80)
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert re.search(r"^c +missing +- +- *$", told, re.MULTILINE)
    assert "did not come within 7 s" in " ".join(told.split())


@pytest.mark.torchrun
def test_a_launch_with_a_different_model_and_a_broken_one(tmp_path: Path) -> None:
    words = ["-m", "pellm_lightning", "doctor", "--model=differing_models.Doctored"]
    words += ["--data=small_module.LittleData"]
    words += ["--trainer.accelerator=cpu", "--trainer.logger=lightning.pytorch.loggers.CSVLogger"]
    words += ["--trainer.logger.save_dir=runs"]
    done = torchrun(3, words, tmp_path)
    assert done.returncode != 0
    assert "cannot begin: ValueError" not in done.stdout
    assert done.stdout.count("2 errors, 0 warnings: a fit would fail.") == 1, done.stdout
    assert "The frozen base model of party 1 is not that of party 0" in done.stdout
    assert "error    fit: Party 2 cannot begin: model='nowhere' cannot be loaded." in done.stdout
    assert re.search(r"ok +network: A sum over all parties takes", done.stdout)
    assert len(re.findall(r"exitcode *: 1", done.stdout)) >= 1
    assert not list(tmp_path.iterdir()), "the doctor wrote a file"
