"""Trainers that are jobs of their own: each a thread over one store, joined by an elastic federation."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from certificates import tls_of
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lora_module import Tuned
from party_threads import (
    Classifier,
    ValidatedClassifier,
    data,
    fit_parties,
    in_threads,
    quiet_trainer,
)
from trainer_jobs import ROSTER, At, Jobs, crash

from pellm_lightning import Overlap
from pellm_lightning.aggregation import ResidualMean
from pellm_lightning.comm import (
    FederationError,
    MismatchError,
    TooFewPartiesError,
)
from pellm_lightning.comm.evidence.chain import Chain
from pellm_lightning.engine.global_state import GlobalState

lists_keys = pytest.mark.skipif(
    not hasattr(dist.HashStore, "list_keys"), reason="the stores of this torch do not list their keys"
)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)


def test_jobs_end_with_the_same_parameters_as_one_launch(jobs: Jobs, tmp_path: Path) -> None:
    jobs.run()
    assert jobs.same("a", "b", "c")

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = ValidatedClassifier(seed=party)
        callback = federated(every_n_steps=2)
        quiet_trainer(tmp_path, [callback], max_epochs=1).fit(module, data(32, seed=party), data(8, seed=9))
        return module.vector()

    # The order in which three float32 terms are added is not the same.
    torch.testing.assert_close(jobs.results["a"].vector(), fit_parties(3, fit)[0], rtol=0, atol=1e-6)
    assert [done["parties"] for done in jobs.logs["a"].rounds] == [3] * 4
    assert len(set(map(tuple, (log.metrics["federated/val_loss"] for log in jobs.logs.values())))) == 1
    assert not list((tmp_path / "a").glob("*")), "state is kept although the federation has ended"


def test_the_others_go_on_without_a_job_that_fails(jobs: Jobs) -> None:
    in_threads([lambda: jobs.fit("a"), lambda: jobs.fit("b"), lambda: jobs.fit("c", At(3, crash))])
    assert str(jobs.results["c"]) == "the disk is full"
    assert jobs.same("a", "b")
    # After round 0 (two steps) party c fails in its fourth step.
    assert [done["parties"] for done in jobs.logs["a"].rounds] == [3, 2, 2, 2]
    assert list((jobs.tmp_path / "c").glob("round-*.safetensors")), "nothing to come back with"


def test_rounds_in_the_background_go_on_without_a_job_that_fails(jobs: Jobs) -> None:
    arguments = {"every_n_steps": 3, "overlap": Overlap(2, mix=0.25)}
    of_each = {"arguments": arguments}
    in_threads(
        [
            lambda: jobs.fit("a", **of_each),
            lambda: jobs.fit("b", **of_each),
            lambda: jobs.fit("c", At(4, crash), **of_each),  # while its first round is under way
        ]
    )
    assert str(jobs.results["c"]) == "the disk is full"
    assert jobs.same("a", "b")
    # Of eight steps, begun after 3 and 6, landed after 5 and 8; the last at the end.
    assert jobs.logs["a"].steps == jobs.logs["b"].steps == [5, 8, 8]
    assert [done["parties"] for done in jobs.logs["a"].rounds][1:] == [2, 2]


def test_evidence_is_read_without_a_copy_of_the_state(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a round is under way, which is waited for, and after the fit."""
    jobs.tls = tls_of
    copies: list[GlobalState] = []
    whole, made = GlobalState.state_dict, jobs.callback
    monkeypatch.setattr(GlobalState, "state_dict", lambda state: copies.append(state) or whole(state))
    callbacks = {name: made(name, every_n_steps=3, overlap=Overlap(2, mix=0.25)) for name in ROSTER}
    monkeypatch.setattr(jobs, "callback", callbacks.__getitem__)
    at_4: dict[str, str | None] = {}

    def read(name: str) -> None:
        at_4[name] = callbacks[name].evidence

    in_threads([lambda n=name: jobs.fit(n, At(4, lambda: read(n))) for name in ROSTER])
    assert jobs.same(*ROSTER)
    # One copy of each party's, as the fit ends.
    assert len(copies) == 3
    for name, callback in callbacks.items():
        assert [c.statement.round for c in Chain.parse(at_4[name] or "").certificates] == [0]
        assert [c.statement.round for c in Chain.parse(callback.evidence or "").certificates] == [0, 1, 2]
        assert callback.evidence == callback.state_dict()["aggregator"]["evidence"]
    assert len(copies) == 3


@lists_keys
def test_who_comes_late_to_rounds_in_the_background_takes_over(jobs: Jobs) -> None:
    jobs.membership["wait_s"] = 1.0
    arguments = {"every_n_steps": 2, "overlap": Overlap(1, mix=0.25)}
    late = threading.Thread(target=lambda: jobs.fit("c", samples=96, arguments=arguments))

    def call_and_wait() -> None:
        late.start()
        deadline = time.monotonic() + 10
        while not any(key.endswith("member/@c") for key in jobs.written()) and time.monotonic() < deadline:
            time.sleep(0.01)

    in_threads(
        [
            lambda: jobs.fit("a", At(5, call_and_wait), arguments=arguments),
            lambda: jobs.fit("b", arguments=arguments),
        ]
    )
    late.join()
    assert jobs.same("a", "b", "c"), jobs.results
    assert jobs.logs["c"].rounds[0]["round"] > 1
    assert {done["parties"] for done in jobs.logs["c"].rounds} == {3}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_with_too_few_left_a_round_in_the_background_stops_the_job(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, wait_s=1.0)
    arguments = {"every_n_steps": 3, "overlap": Overlap(1, mix=0.25)}
    in_threads(
        [
            lambda: jobs.fit("a", arguments=arguments),
            lambda: jobs.fit("b", At(5, crash), arguments=arguments),
            lambda: jobs.fit("c", At(5, crash), arguments=arguments),
        ]
    )
    assert isinstance(jobs.results["a"], TooFewPartiesError)
    stopped = tmp_path / "stopped.ckpt"
    assert torch.load(stopped, weights_only=True)["global_step"] == 7, "it has begun after six steps"
    of_each = {"arguments": arguments}
    jobs.run(a={"ckpt_path": stopped, **of_each}, b=of_each, c=of_each)
    assert jobs.same("a", "b", "c")


def test_all_stop_when_one_is_lost_if_they_were_told_to(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, on_party_loss="stop")
    in_threads([lambda: jobs.fit("a"), lambda: jobs.fit("b"), lambda: jobs.fit("c", At(3, crash))])
    for name in ("a", "b"):
        assert isinstance(jobs.results[name], FederationError)
        assert "Party c was lost (" in str(jobs.results[name])
    # Whoever notices first has seen why; the other may have it from the plan only.
    told = "".join(str(jobs.results[name]) for name in ("a", "b"))
    assert "it left while training after round 0: RuntimeError: the disk is full" in told


@lists_keys
def test_a_job_that_comes_late_takes_over_and_counts_0(jobs: Jobs) -> None:
    jobs.membership["wait_s"] = 1.0  # the first two begin without the third
    late = threading.Thread(target=lambda: jobs.fit("c", samples=96))

    def call_and_wait() -> None:
        late.start()
        deadline = time.monotonic() + 10
        while not any(key.endswith("member/@c") for key in jobs.written()) and time.monotonic() < deadline:
            time.sleep(0.01)

    in_threads([lambda: jobs.fit("a", At(5, call_and_wait)), lambda: jobs.fit("b")])
    late.join()
    assert jobs.same("a", "b", "c"), jobs.results
    # It came while the others were in round 2 of 4 and counted 0 there. Its 24 steps would make 12 rounds,
    # but after round 3 no quorum trains with it: the next one moves nothing, and is the last.
    assert [done["round"] for done in jobs.logs["c"].rounds] == [3, 4]
    assert [done["active_parties"] for done in jobs.logs["c"].rounds] == [3, 0]
    assert [done["parties"] for done in jobs.logs["c"].rounds] == [3] * 2
    assert [done["parties"] for done in jobs.logs["a"].rounds][:3] == [2, 2, 3]
    assert jobs.logs["a"].rounds[2]["active_parties"] == 2


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_with_too_few_left_a_job_keeps_its_steps_and_resumes(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, wait_s=1.5)
    in_threads(
        [
            lambda: jobs.fit("a"),
            lambda: jobs.fit("b", At(3, crash)),
            lambda: jobs.fit("c", At(3, crash)),
        ]
    )
    error = jobs.results["a"]
    assert isinstance(error, TooFewPartiesError)
    assert "missing: b (it left while training after round 0" in str(error)
    stopped = tmp_path / "stopped.ckpt"
    assert f"Its own steps since the last round are in {stopped}" in str(error)
    state = torch.load(stopped, weights_only=True)
    assert state["global_step"] == 4
    # All three are started again: a from what it kept, the others with the state of round 1.
    jobs.run(a={"ckpt_path": stopped})
    assert jobs.same("a", "b", "c")
    # They go on after round 0; one that was slower to start finds the others a round further.
    assert min(jobs.logs[name].rounds[0]["round"] for name in ROSTER) == 1


def test_a_job_of_another_configuration_is_refused_and_the_others_go_on(jobs: Jobs) -> None:
    jobs.membership["wait_s"] = 1.5
    in_threads(
        [
            lambda: jobs.fit("a"),
            lambda: jobs.fit("b"),
            lambda: jobs.fit("c", arguments={"weighting": "uniform"}),
        ]
    )
    assert isinstance(jobs.results["c"], MismatchError)
    assert "party c has weighting='uniform'" in str(jobs.results["c"])
    assert jobs.same("a", "b")


def test_a_rule_that_writes_frozen_weights_is_refused(jobs: Jobs) -> None:
    jobs.run(
        "a",
        a={"module": Tuned(0), "validates": False, "arguments": {"aggregation": ResidualMean()}},
    )
    assert "which a party that comes back cannot be given" in str(jobs.results["a"])


def test_sigterm_ends_the_waiting(jobs: Jobs) -> None:
    """Lightning only takes note of the signal; a party that waits for others must look."""
    trainers: list[Trainer] = []

    class Terminated(Callback):
        def on_fit_start(self, trainer: Trainer, module: Any) -> None:
            trainers.append(trainer)
            threading.Timer(0.5, lambda: setattr(trainer._signal_connector, "received_sigterm", True)).start()

    jobs.fit("a", Terminated())
    assert isinstance(jobs.results["a"], SIGTERMException)
    assert trainers


def test_a_party_that_ends_alone_keeps_the_last_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = Jobs(tmp_path, wait_s=1.5)
    # Party a is through after four steps; of the others, which have eight, both fail in the sixth.
    in_threads(
        [
            lambda: jobs.fit("a", samples=16, limit_val_batches=0),
            lambda: jobs.fit("b", At(5, crash)),
            lambda: jobs.fit("c", At(5, crash)),
        ]
    )
    assert isinstance(jobs.results["a"], Classifier), jobs.results["a"]
    assert "Ends without the other parties" in caplog.text
