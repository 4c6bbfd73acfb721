"""A loop of one's own trains as the callback's Trainer does."""

import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import torchrun
from party_threads import Classifier, data, fit_parties, quiet_trainer, run_parties, session_of
from paths import SCRIPTS
from peft import LoraConfig, get_peft_model

from pellm_lightning import FederatedLoop, Overlap, Parameters
from pellm_lightning.aggregation import FrozenA, Mean, ResidualMean
from pellm_lightning.comm import FederationError, MismatchError, TooFewPartiesError
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.join import launch_topology
from pellm_lightning.engine.aggregator import Aggregator
from pellm_lightning.integrations.federated_loop import OwnTraining

N = 2


def own_loop(
    federation: Any,
    samples: int = 8,
    *,
    epochs: int = 2,
    accumulate: int = 1,
    optimizer: str = "SGD",
    **arguments: Any,
) -> tuple[torch.Tensor, FederatedLoop]:
    """Train a Classifier as its Trainer would, by hand."""
    party = federation.party
    module = Classifier(seed=party, optimizer=optimizer)
    local = module.configure_optimizers()
    loader = data(samples, seed=party)
    steps = epochs * math.ceil(len(loader) / accumulate)
    loop = FederatedLoop(
        module, local, planned_steps=steps, session=session_of(federation), **({"record": False} | arguments)
    )
    with loop as federated:
        for _ in range(epochs):
            for index, (x, y) in enumerate(loader):
                loss = torch.nn.functional.cross_entropy(module(x), y)
                (loss / accumulate).backward()
                if (index + 1) % accumulate and index + 1 < len(loader):
                    federated.count(len(x), loss)
                    continue
                local.step()
                local.zero_grad()
                federated.after_step(len(x), loss)
                if federated.should_stop:
                    break
            federated.after_epoch()
            if federated.should_stop:
                break
    return module.vector(), loop


def in_trainer(
    tmp_path: Path, samples: Any, *, epochs: int, accumulate: int, optimizer: str, **arguments: Any
) -> list[torch.Tensor]:
    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party, optimizer=optimizer)
        trainer = quiet_trainer(
            tmp_path,
            [federated(record=False, **arguments)],
            max_epochs=epochs,
            accumulate_grad_batches=accumulate,
        )
        trainer.fit(module, data(samples(party), seed=party))
        return module.vector()

    return fit_parties(N, fit)


SETTINGS = [
    {"every_n_steps": 3},
    {"every_n_epochs": 1},
    {"every_n_epochs": 2, "weighting": "uniform"},
    {"every_n_steps": 2, "inner_optimizer_state": "reset"},
    {"every_n_steps": 4, "overlap": Overlap(delay_steps=1)},
    {"every_n_epochs": 1, "overlap": Overlap(delay_steps=1)},
    {"every_n_steps": 2, "outer_optimizer": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)},
]


@settings(max_examples=12, deadline=None)
@given(
    which=st.sampled_from(SETTINGS),
    samples=st.tuples(st.integers(5, 20), st.integers(5, 20)),
    epochs=st.integers(1, 3),
    accumulate=st.integers(1, 2),
    optimizer=st.sampled_from(["SGD", "Adam"]),
)
def test_it_trains_to_the_parameters_of_the_callback(
    tmp_path_factory: pytest.TempPathFactory,
    which: dict[str, Any],
    samples: tuple[int, int],
    epochs: int,
    accumulate: int,
    optimizer: str,
) -> None:
    common = {"epochs": epochs, "accumulate": accumulate, "optimizer": optimizer, "quorum": 1} | which
    expected = in_trainer(tmp_path_factory.mktemp("fit"), lambda party: samples[party], **common)
    found = run_parties(N, lambda f: own_loop(f, samples[f.party], **common)[0])
    for own, of_trainer in zip(found, expected, strict=True):
        assert torch.equal(own, of_trainer)
    assert torch.equal(found[0], found[1])


def test_only_what_trains_leaves_and_patterns_select() -> None:
    excluded = Parameters(exclude=["*bias"])

    def act(federation: Any) -> torch.Tensor:
        module = own_loop(federation, every_n_epochs=1, parameters=excluded)
        return module[0]

    first, second = run_parties(N, act)
    weights = 16 * 3
    assert torch.equal(first[:weights], second[:weights])
    assert not torch.equal(first[weights:], second[weights:])


def test_metrics_are_means_over_the_parties() -> None:
    def act(federation: Any) -> dict[str, float]:
        module = Classifier(seed=federation.party)
        with FederatedLoop(module, session=session_of(federation), record=False) as federated:
            return federated.mean(
                {"accuracy": 0.25 * (federation.party + 1)}, samples=1 + 2 * federation.party
            )

    assert run_parties(N, act) == [{"accuracy": pytest.approx((0.25 + 3 * 0.5) / 4)}] * N


def test_it_resumes_in_the_middle_of_a_round(tmp_path: Path) -> None:
    def train(federation: Any, first: int, last: int, state: dict[str, Any] | None) -> Any:
        module = Classifier(seed=federation.party)
        optimizer = torch.optim.Adam(module.head.parameters(), lr=0.1)
        folder = tmp_path / f"from-{first}"
        loop = FederatedLoop(
            module, optimizer, session=session_of(federation), folder=folder, every_n_steps=3
        )
        if state is not None:
            module.load_state_dict(state["module"])
            optimizer.load_state_dict(state["optimizer"])
            loop.load_state_dict(state["federated"])
        batches = list(data(40, seed=federation.party))
        loop.start()
        loop.mean({"loss": 1.0})
        for x, y in batches[first:last]:
            loss = torch.nn.functional.cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loop.after_step(len(x), loss)
        if last < len(batches):
            path = tmp_path / f"{federation.party}.pt"
            saved = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "federated": loop.state_dict(),
            }
            torch.save(saved, path)
            return torch.load(path, weights_only=True)
        loop.finish()
        return module.vector(), [report.round for report in loop.rounds]

    whole = run_parties(N, lambda f: train(f, 0, 10, None))
    states = run_parties(N, lambda f: train(f, 0, 4, None))
    resumed = run_parties(N, lambda f: train(f, 4, 10, states[f.party]))
    for (vector, rounds), (expected, of_whole) in zip(resumed, whole, strict=True):
        assert torch.equal(vector, expected)
        assert rounds == of_whole[1:]
    lines = (tmp_path / "from-4/party-0/rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines if '"validation"' in line] == [0], "after round 0"
    swapped = run_parties(N, lambda f: train(f, 4, 10, states[1 - f.party]), may_fail=True)
    assert any("resumes a checkpoint that party 1 has saved" in str(error) for error in swapped)


def test_a_rule_that_freezes_factors_drops_their_gradients() -> None:
    def act(federation: Any) -> bool:
        model = get_peft_model(Classifier(seed=0), LoraConfig(r=2, target_modules=["head"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loop = FederatedLoop(
            model, optimizer, session=session_of(federation), record=False, aggregation=FrozenA()
        )
        with loop as federated:
            before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}
            assert before
            hooked = [name for name, p in model.named_parameters() if p._post_accumulate_grad_hooks]
            assert hooked == list(before), "a hook at every parameter is called for every parameter"
            model(torch.ones(2, 8)).square().sum().backward()
            assert all(p.grad is None for name, p in model.named_parameters() if "lora_A" in name)
            optimizer.step()
            federated.after_step(2)
        return all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)

    assert all(run_parties(N, act))


def test_an_error_in_the_loop_is_told_to_the_others() -> None:
    def act(federation: Any) -> None:
        module = Classifier(seed=0)
        with FederatedLoop(
            module, session=session_of(federation), record=False, every_n_steps=1
        ) as federated:
            if federation.party == 1:
                raise ArithmeticError("no more data")
            federated.after_step(1)

    first, second = run_parties(N, act, may_fail=True)
    assert isinstance(second, ArithmeticError)
    assert isinstance(first, FederationError)
    assert "ArithmeticError: no more data" in str(first)


def test_below_a_quorum_all_stop_and_what_was_trained_is_kept(tmp_path: Path) -> None:
    def act(federation: Any) -> tuple[bool, int]:
        module = Classifier(seed=0)
        optimizer = module.configure_optimizers()
        loop = FederatedLoop(
            module, optimizer, session=session_of(federation), record=False, every_n_steps=1, folder=tmp_path
        )
        with loop as federated:
            for _ in range(2 + 20 * federation.party):
                if federated.should_stop:
                    break
                federated.after_step(1)
        return loop.should_stop, loop._own.steps

    (_, first), (stopped, second) = run_parties(N, act)
    assert first == 2
    assert stopped
    assert second < 10


@pytest.mark.parametrize("leads", [True, False])
def test_what_a_loop_keeps_below_a_quorum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leads: bool
) -> None:
    """Frozen weights that a rule has written into belong to it; of a party one process writes."""

    def too_few(*_: Any, **__: Any) -> None:
        raise TooFewPartiesError("Only 1 party is left.")

    def act(federation: Any) -> None:
        model = get_peft_model(Classifier(seed=0), LoraConfig(r=2, target_modules=["head"]))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loop = FederatedLoop(
            model,
            optimizer,
            session=session_of(federation),
            folder=tmp_path,
            aggregation=ResidualMean(),
            every_n_steps=1,
        )
        with loop as federated, monkeypatch.context() as patch:
            patch.setattr(Aggregator, "step", too_few)
            save = OwnTraining.save
            patch.setattr(OwnTraining, "save", lambda own, path, leads: save(own, path, leads=wanted))
            federated.after_step(1)

    wanted = leads
    (error,) = run_parties(1, act, may_fail=True)
    assert isinstance(error, TooFewPartiesError)
    path = tmp_path / "stopped.ckpt"
    assert f"are in {path}. It holds parameters without optimizers" in str(error)
    assert path.exists() == leads
    if leads:
        saved = torch.load(path, weights_only=True)
        assert saved["step"] == 1
        kinds = {name.split(".")[-3 if "lora_" in name else -2] for name in saved["parameters"]}
        assert kinds == {"lora_A", "lora_B", "base_layer"}


def test_it_stops_when_its_local_training_is_asked_to() -> None:
    local = OwnTraining(Classifier(), (), math.nan)
    loop = FederatedLoop(Classifier(), local=local)
    local.stop()
    assert loop.should_stop


def test_a_party_with_nearly_all_weights_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def act(federation: Any) -> None:
        module = Classifier(seed=0)
        with FederatedLoop(
            module, session=session_of(federation), record=False, every_n_steps=1
        ) as federated:
            for _ in range(3):
                federated.after_step(1 + 99 * federation.party)

    with caplog.at_level(logging.WARNING):
        run_parties(N, act)
    said = [record.getMessage() for record in caplog.records if " has 99 " in record.getMessage()]
    assert {message.partition("]")[0] for message in said} == {
        "[party 0",
        "[party 1",
    }  # terminals of their own
    assert len(said) == N
    assert all("Round 0: party 1 has 99 %" in message for message in said)


def test_the_record_is_that_of_a_fit(tmp_path: Path) -> None:
    run_parties(N, lambda f: own_loop(f, every_n_epochs=1, record=True, folder=tmp_path))
    for party in range(N):
        lines = (tmp_path / f"party-{party}" / "rounds.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        assert [event["event"] for event in events] == ["start", "round", "round", "end"]
        assert events[0]["party"] == party


def test_what_is_trained_later_is_refused() -> None:
    def act(federation: Any) -> None:
        module = Classifier(seed=0)
        optimizer = torch.optim.SGD([*module.head.parameters(), *module.base.parameters()], lr=0.1)
        with FederatedLoop(module, optimizer, session=session_of(federation), record=False) as federated:
            module.base.requires_grad_(True)
            federated.after_step(1)

    errors = run_parties(1, act, may_fail=True)
    assert "'base.weight' (2 in all) trains since epoch 0, step 1" in str(errors[0])


def test_wrong_arguments_are_refused_before_anybody_joins() -> None:
    module = Classifier(seed=0)
    for arguments, words in (
        ({"every_n_steps": 0}, "every_n_steps=0 must be at least 1"),
        ({"weighting": "most"}, "weighting='most' must be one of"),
        ({"aggregation": Mean}, "aggregation=.* must be of the class Aggregation"),
        ({"timeout_s": 0}, "timeout_s=0 must be positive"),
        ({"quorum": 0}, "quorum=0 must be"),
    ):
        with pytest.raises(ValueError, match=words):
            FederatedLoop(module, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="every_n_rounds"):
        FederatedLoop(module, every_n_rounds=1)
    with pytest.raises(RuntimeError, match="no rounds yet"):
        FederatedLoop(module).after_step(1)


def test_a_group_over_several_parties_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        patch.setenv("WORLD_SIZE", "4")
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 4)
        patch.setattr(torch.distributed, "get_rank", lambda: 1)
        with pytest.raises(FederationError, match="spans 4 of the launch's 4 processes, so gradients cross"):
            launch_topology(None)
        with pytest.raises(FederationError, match=r"so gradients cross between parties \(num_parties=2\)"):
            launch_topology(None, num_parties=2)
        assert launch_topology(None, num_parties=1).party_size == 4
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        topology = launch_topology(None)
        assert (topology.party, topology.num_parties, topology.rank_in_party, topology.party_size) == (
            0,
            2,
            1,
            2,
        )


def test_processes_of_a_party_without_its_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would join as if it led the party."""
    jobs = SeparateJobs("tcp://127.0.0.1:1", "a", ["a", "b"])
    with monkeypatch.context() as patch:
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
            patch.setenv(name, value)
        with pytest.raises(FederationError, match="The launch of party 'a' has 2 processes, but torch's"):
            FederatedLoop(Classifier(), jobs=jobs).join()
        with pytest.raises(FederationError, match=r"join as if it were a party \(num_parties=1\)"):
            FederatedLoop(Classifier(), num_parties=1).join()


def test_a_module_without_parameters_is_refused() -> None:
    def act(federation: Any) -> None:
        FederatedLoop(torch.nn.Identity(), session=session_of(federation)).start()

    (error,) = run_parties(1, act, may_fail=True)
    assert isinstance(error, ValueError)


def test_a_module_whose_shards_are_elsewhere_is_refused() -> None:
    """As the one inside of a DeepSpeed engine, whose optimizer overwrites what a round has written."""

    def act(federation: Any) -> None:
        module = torch.nn.Linear(2, 1)
        module.weight._hp_mapping = None
        FederatedLoop(module, session=session_of(federation), every_n_steps=1, record=False).start()

    for error in run_parties(N, act, may_fail=True):
        assert isinstance(error, ValueError | FederationError)
        assert "shards of the parameter 'weight' outside of this Linear" in str(error)


@pytest.mark.torchrun
def test_fabric_trains_parties_of_two_processes(tmp_path: Path) -> None:
    done = torchrun(4, [str(SCRIPTS / "fabric_parties.py"), str(tmp_path)], tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    first, *others = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    assert [first["party"], *(other["party"] for other in others)] == [0, 0, 1, 1]
    assert all(torch.equal(first["vector"], other["vector"]) for other in others)
    # Each process has 2 batches of 4 per epoch: a round of two steps has 16 samples of a party.
    assert first["weights"] == [16.0, 16.0]


def test_parties_that_differ_are_told() -> None:
    def act(federation: Any) -> None:
        own_loop(federation, every_n_steps=1 + federation.party)

    errors = run_parties(N, act, may_fail=True)
    assert any(isinstance(error, MismatchError) for error in errors)
