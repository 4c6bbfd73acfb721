"""Checkpoints: a resumed federation goes on to the bit, wherever in a round it was saved."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from party_threads import (
    Classifier,
    Rounds,
    ValidatedClassifier,
    data,
    fit_parties,
    linear,
    quiet_trainer,
)
from stateful_loader import StatefulLoader

from pellm_lightning import FederationError, Overlap, Parameters
from pellm_lightning.engine.optim import Yogi
from pellm_lightning.exchange import Quantized

DILOCO = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
FEDADAM = partial(torch.optim.Adam, lr=0.05, eps=1e-3)
YOGI = partial(Yogi, lr=0.05)
COSINE = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4)


class Run:
    """One federation of two parties that saves after each step or epoch below ``root``."""

    def __init__(self, root: Path, every: str, options: dict[str, Any], **trainer: Any) -> None:
        self.root, self.every, self.options = root, every, options
        self.trainer = {"max_epochs": 3} | trainer
        self.loggers = [Rounds(), Rounds()]

    def fit(self, ckpt: str | None = None) -> list[tuple[torch.Tensor, Any]]:
        """Return each party's parameters and Adam state; ``ckpt`` names what to resume from."""
        return fit_parties(2, partial(self._fit, ckpt))

    def _fit(self, ckpt: str | None, party: int, federated: Any) -> tuple[torch.Tensor, Any]:
        directory = self.root / f"party-{party}"
        checkpoint = ModelCheckpoint(
            directory, filename="{step}", save_top_k=-1, enable_version_counter=False, **{self.every: 1}
        )
        module = Classifier(seed=party if ckpt is None else 77, optimizer="Adam", lr=0.01)
        trainer = quiet_trainer(
            self.root,
            [checkpoint, federated(**self.options)],
            logger=self.loggers[party],
            enable_checkpointing=True,
            **self.trainer,
        )
        loader = StatefulLoader(party)
        trainer.fit(module, loader, ckpt_path=None if ckpt is None else directory / f"step={ckpt}.ckpt")
        return module.vector(), trainer.optimizers[0].state_dict()["state"]


def assert_goes_on_exactly(whole: Run, resumed: Run, step: str) -> None:
    expected, got = whole.fit(), resumed.fit(step)
    assert torch.equal(got[0][0], got[1][0])
    for (vector, state), (other, other_state) in zip(expected, got, strict=True):
        assert torch.equal(vector, other)
        for index, moments in state.items():
            assert all(torch.equal(moments[key], other_state[index][key]) for key in moments)
    for logger, other_logger in zip(whole.loggers, resumed.loggers, strict=True):
        later = [done for done in logger.rounds if done["step"] > int(step)]
        assert 0 < len(later) == len(other_logger.rounds)
        for done, again in zip(later, other_logger.rounds, strict=True):
            keys = ("round", "step", "weight", "total_weight", "loss", "update_norm", "distance", "outer_lr")
            assert {key: done.get(key) for key in keys} == {key: again.get(key) for key in keys}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("options", "trainer", "step"),
    [
        # Five steps an epoch, three epochs. Rounds after epochs 2 and 3: saved in the middle of the first.
        ({"every_n_epochs": 2}, {}, "5"),
        ({"every_n_epochs": 2, "outer_optimizer": FEDADAM}, {}, "5"),
        ({"every_n_epochs": 2, "outer_optimizer": YOGI}, {}, "5"),
        ({"every_n_epochs": 1, "outer_scheduler": COSINE}, {}, "10"),
        ({"every_n_epochs": 2, "inner_optimizer_state": "reset"}, {}, "5"),
        ({"every_n_epochs": 2, "weighting": "uniform"}, {}, "5"),
        ({"every_n_epochs": 2}, {"precision": "bf16-true"}, "5"),
        # Saved exactly at a round.
        ({"every_n_epochs": 1}, {}, "5"),
        ({"every_n_epochs": 2}, {}, "10"),
    ],
)
def test_resume_at_an_epoch(
    tmp_path: Path, options: dict[str, Any], trainer: dict[str, Any], step: str
) -> None:
    options = {"outer_optimizer": DILOCO} | options
    whole = Run(tmp_path, "every_n_epochs", options, **trainer)
    assert_goes_on_exactly(whole, Run(tmp_path, "every_n_epochs", options, **trainer), step)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("step", ["1", "3", "4", "5", "8", "12"])
def test_resume_at_any_step(tmp_path: Path, step: str) -> None:
    # Rounds after steps 3, 6, 9, 12 and 15, epochs of 5: at the start and end of a round, across an epoch.
    options = {"every_n_steps": 3, "outer_optimizer": DILOCO}
    whole = Run(tmp_path, "every_n_train_steps", options)
    assert_goes_on_exactly(whole, Run(tmp_path, "every_n_train_steps", options), step)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_with_gradient_accumulation(tmp_path: Path) -> None:
    # Steps after batches 2, 4 and 5 of an epoch; rounds after steps 2, 4, ...
    options = {"every_n_steps": 2, "outer_optimizer": DILOCO}
    trainer = {"accumulate_grad_batches": 2}
    whole = Run(tmp_path, "every_n_train_steps", options, **trainer)
    assert_goes_on_exactly(whole, Run(tmp_path, "every_n_train_steps", options, **trainer), "3")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("exchange", [None, Quantized(4, error_feedback=True)])
@pytest.mark.parametrize("step", ["3", "4", "5", "6"])
def test_resume_while_a_round_is_under_way(tmp_path: Path, step: str, exchange: Any) -> None:
    # Rounds begin after steps 4, 8 and 12 and land two steps later.
    options = {"every_n_steps": 4, "outer_optimizer": DILOCO, "overlap": Overlap(2, mix=0.25)}
    options["exchange"] = exchange
    whole = Run(tmp_path, "every_n_train_steps", options)
    assert_goes_on_exactly(whole, Run(tmp_path, "every_n_train_steps", options), step)


class Layered(Classifier):
    """A classifier with three trained layers, which can be fragments."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        seed = arguments.get("seed", 0)
        layers = [linear(16, 16, seed=10 * seed + 1), linear(16, 16, seed=10 * seed + 2), self.head]
        self.head = torch.nn.Sequential(*layers)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("overlap", [Overlap(fragments=3), Overlap(1, mix=0.25, fragments=3)])
@pytest.mark.parametrize("step", ["4", "5"])
def test_resume_between_fragments(
    tmp_path: Path, step: str, overlap: Overlap, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fragment after steps 2, 4, 6...: each after six.
    monkeypatch.setitem(globals(), "Classifier", Layered)
    options = {"every_n_steps": 6, "outer_optimizer": DILOCO, "overlap": overlap}
    options["exchange"] = Quantized(8, error_feedback=True)
    whole = Run(tmp_path, "every_n_train_steps", options)
    assert_goes_on_exactly(whole, Run(tmp_path, "every_n_train_steps", options), step)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_what_was_under_way_is_not_resumed_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "Classifier", Layered)
    options = {"every_n_steps": 6, "overlap": Overlap(1, mix=0.25, fragments=3)}
    Run(tmp_path, "every_n_train_steps", options).fit()
    for others, words in [
        ({"overlap": Overlap(1)}, "is of fragments=3, now it is fragments=1"),
        ({"overlap": Overlap(1, fragments=2)}, "is of fragments=3, now it is fragments=2"),
        ({"overlap": Overlap(fragments=3)}, "saved while a round was under way, begun at step 4"),
    ]:
        with pytest.raises(MisconfigurationException, match=words):
            Run(tmp_path, "every_n_train_steps", options | others).fit("4")


def save(root: Path, name: str, *, parties: int = 2, seed: int = 0, **options: Any) -> list[Path]:
    """Train for two epochs, save at the end; return each party's checkpoint."""

    def fit(party: int, federated: Any) -> Path:
        module = Classifier(seed=seed + party, optimizer="Adam")
        trainer = quiet_trainer(root, [federated(**options)], max_epochs=2)
        trainer.fit(module, data(8, seed=seed + party))
        trainer.save_checkpoint(root / f"{name}-{party}.ckpt")
        return root / f"{name}-{party}.ckpt"

    return fit_parties(parties, fit)


def test_a_checkpoint_saved_after_the_fit_keeps_the_state(tmp_path: Path) -> None:
    options = {"outer_optimizer": DILOCO}
    paths = save(tmp_path, "end", **options)

    def fit(ckpt: list[Path] | None, party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party, optimizer="Adam")
        trainer = quiet_trainer(tmp_path, [federated(**options)], max_epochs=4)
        trainer.fit(module, data(8, seed=party), ckpt_path=None if ckpt is None else ckpt[party])
        return module.vector()

    whole = fit_parties(2, partial(fit, None))
    resumed = fit_parties(2, partial(fit, paths))
    assert all(torch.equal(whole[0], vector) for vector in (*whole, *resumed))


def test_the_state_outlives_a_test_run(tmp_path: Path) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    def fit(party: int, federated: Any) -> dict[str, Any]:
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=3)
        module = Tested(seed=party)
        trainer.fit(module, data(8, seed=party))
        trainer.test(module, data(8, seed=party), verbose=False)
        trainer.save_checkpoint(tmp_path / f"{party}.ckpt")
        return torch.load(tmp_path / f"{party}.ckpt")["callbacks"]

    for states in fit_parties(2, fit):
        assert states["FederatedAveraging"]["aggregator"]["round"] == 3


def test_a_state_loaded_for_a_test_run_does_not_leak_into_the_next_fit(tmp_path: Path) -> None:
    paths = save(tmp_path, "old", outer_optimizer=DILOCO)

    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    def fit(test_first: bool, party: int, federated: Any) -> tuple[torch.Tensor, list[float]]:
        callback, logger = federated(outer_optimizer=DILOCO), Rounds()
        if test_first:
            tester = quiet_trainer(tmp_path, [callback])
            tester.test(Tested(seed=5), data(8, seed=0), ckpt_path=paths[party], verbose=False)
        module = Tested(seed=party, optimizer="Adam")
        quiet_trainer(tmp_path, [callback], logger=logger).fit(module, data(8, seed=party))
        return module.vector(), [done["round"] for done in logger.rounds]

    fresh = fit_parties(2, partial(fit, False))
    tested = fit_parties(2, partial(fit, True))
    for (vector, rounds), (expected, _) in zip(tested, fresh, strict=True):
        assert torch.equal(vector, expected)
        assert rounds == [0, 1]


def test_checkpoints_hold_tensors_and_plain_containers_only(tmp_path: Path) -> None:
    for path in save(tmp_path, "plain", outer_optimizer=FEDADAM):
        state = torch.load(path, weights_only=True)["callbacks"]["FederatedAveraging"]
        assert state["aggregator"]["round"] == 2
        assert state["aggregator"]["global"].dtype == torch.float32


# ---- checkpoints without frozen parameters


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_small_checkpoints_resume_exactly(tmp_path: Path) -> None:
    options = {"every_n_epochs": 2, "outer_optimizer": DILOCO, "parameters": Parameters(save_frozen=False)}
    whole = Run(tmp_path, "every_n_epochs", options)
    assert_goes_on_exactly(whole, Run(tmp_path, "every_n_epochs", options), "5")


def test_small_checkpoints_hold_no_frozen_parameter(tmp_path: Path) -> None:
    class Large(Classifier):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.frozen = torch.nn.Linear(512, 512).requires_grad_(False)
            self.register_buffer("scale", torch.ones(2))
            torch.nn.init.zeros_(self.frozen.weight)
            torch.nn.init.zeros_(self.frozen.bias)

    def fit(party: int, federated: Any) -> tuple[Path, Large]:
        module = Large(seed=party)
        trainer = quiet_trainer(tmp_path, [federated(parameters=Parameters(save_frozen=False))], max_epochs=1)
        trainer.fit(module, data(8, seed=party))
        trainer.save_checkpoint(tmp_path / f"{party}.ckpt")
        return tmp_path / f"{party}.ckpt", module

    for path, module in fit_parties(2, fit):
        saved = torch.load(path)["state_dict"]
        # A buffer is no parameter: BatchNorm's statistics belong to the trained model.
        assert saved.keys() == {"head.weight", "head.bias", "scale"}
        assert path.stat().st_size < 20_000, "the frozen layer alone has 1 MB"
        fresh = Large(seed=99)
        outcome = fresh.load_state_dict(saved, strict=False)
        assert not outcome.unexpected_keys
        assert all(
            torch.equal(value, fresh.state_dict()[name]) for name, value in module.state_dict().items()
        )


def test_small_checkpoints_test_on_a_fresh_base(tmp_path: Path) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("sum", self(batch[0]).sum())

    def fit(party: int, federated: Any) -> list[Any]:
        callback = federated(parameters=Parameters(save_frozen=False))
        module = Tested(seed=party)
        trainer = quiet_trainer(tmp_path, [callback], max_epochs=1)
        trainer.fit(module, data(8, seed=party))
        trainer.save_checkpoint(tmp_path / f"{party}.ckpt")
        return [
            quiet_trainer(tmp_path, [callback]).test(model, data(8, seed=3), ckpt_path=path, verbose=False)[0]
            for model, path in ((module, None), (Tested(seed=88), tmp_path / f"{party}.ckpt"))
        ]

    for trained, loaded in fit_parties(2, fit):
        assert trained == loaded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.bias"), r"lacks the parameter 'head.bias' \(1 in all\)"),
        (lambda state: state.update(lora=torch.ones(1)), r"holds the unknown parameter 'lora' \(1 in all\)"),
    ],
)
def test_a_small_checkpoint_of_another_model_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    (path,) = save(tmp_path, "wrong", parties=1, parameters=Parameters(save_frozen=False))
    checkpoint = torch.load(path)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, path)

    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(tmp_path, [federated(parameters=Parameters(save_frozen=False))], max_epochs=3)
        trainer.fit(Classifier(optimizer="Adam"), data(8, seed=0), ckpt_path=path)

    with pytest.raises(ValueError, match=message):
        fit_parties(1, fit)


# ---- checkpoints that do not belong together


def resume_each(root: Path, paths: list[Path | None], **options: Any) -> list[Any]:
    """Resume each party from its own checkpoint, or none; return what each raised."""

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party, optimizer="Adam")
        before = module.vector()
        trainer = quiet_trainer(root, [federated(**options)], max_epochs=5)
        try:
            trainer.fit(module, data(8, seed=party), ckpt_path=paths[party])
        except FederationError as error:
            if paths[party] is None:
                assert torch.equal(module.vector(), before), "no parameter may change"
            return str(error)
        return "no error"

    return fit_parties(2, fit)


def test_resuming_one_party_only_is_refused(tmp_path: Path) -> None:
    first, _ = save(tmp_path, "a")
    for error in resume_each(tmp_path, [first, None]):
        assert "Party 0 starts at round 2, party 1 at round 0. Resume all parties" in error


def test_checkpoints_of_two_federations_are_refused(tmp_path: Path) -> None:
    first, _ = save(tmp_path, "a")
    _, second = save(tmp_path, "b", seed=40)
    for error in resume_each(tmp_path, [first, second]):
        assert "Parties 0 and 1 resume round 2 with different global vectors" in error


def test_a_checkpoint_of_other_federated_parameters_is_refused(tmp_path: Path) -> None:
    paths = save(tmp_path, "a")

    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(
            tmp_path, [federated(parameters=Parameters(exclude=["head.bias"]))], max_epochs=5
        )
        trainer.fit(Classifier(optimizer="Adam"), data(8, seed=party), ckpt_path=paths[party])

    for error in fit_parties(2, fit, may_fail=True):
        assert isinstance(error, ValueError | FederationError)
        assert "head.bias" in str(error)
        assert "include and exclude patterns of the checkpoint" in str(error)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_an_interrupted_federation_resumes_from_its_exception_checkpoints(tmp_path: Path) -> None:
    class Failing(Classifier):
        fail_at: int | None = None

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.global_step == self.fail_at:
                raise OSError("disk full")
            return super().training_step(batch, batch_idx)

    def fit(fail_at: int | None, ckpt: bool, party: int, federated: Any) -> torch.Tensor:
        module = Failing(seed=party, optimizer="Adam")
        module.fail_at = fail_at if party == 1 else None
        checkpoint = ModelCheckpoint(
            tmp_path / f"party-{party}",
            filename="stopped",
            save_on_exception=True,
            enable_version_counter=False,
        )
        trainer = quiet_trainer(
            tmp_path, [checkpoint, federated(every_n_steps=3)], max_epochs=2, enable_checkpointing=True
        )
        loader = StatefulLoader(party)
        path = tmp_path / f"party-{party}" / "stopped.ckpt"
        trainer.fit(module, loader, ckpt_path=path if ckpt else None)
        return module.vector()

    first, second = fit_parties(2, partial(fit, 4, False), may_fail=True)
    assert isinstance(second, OSError)
    assert "Party 1 left the federation" in str(first)
    assert "disk full" in str(first)
    first, second = fit_parties(2, partial(fit, None, True))
    assert torch.equal(first, second)


def test_a_fit_that_was_over_already_lets_nobody_wait(tmp_path: Path) -> None:
    paths = save(tmp_path, "done")

    def fit(party: int, federated: Any) -> int:
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=2)
        trainer.fit(Classifier(optimizer="Adam"), data(8, seed=party), ckpt_path=paths[party])
        return trainer.global_step

    assert fit_parties(2, fit) == [4, 4]


def test_validation_in_a_resumed_fit_measures_the_restored_weights(tmp_path: Path) -> None:
    """A resumed federation logs its metrics as the whole one did."""
    loggers = {name: [Rounds(), Rounds()] for name in ("whole", "resumed")}

    def fit(name: str, ckpt: list[Path] | None, party: int, federated: Any) -> Path:
        trainer = quiet_trainer(
            tmp_path, [federated()], max_epochs=4 if ckpt else 2, logger=loggers[name][party]
        )
        if name == "whole":
            trainer = quiet_trainer(tmp_path, [federated()], max_epochs=4, logger=loggers[name][party])
        module = ValidatedClassifier(seed=party)
        path = ckpt[party] if ckpt else None
        trainer.fit(module, data(8, seed=party), data(6, seed=20 + party), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"v-{party}.ckpt")
        return tmp_path / f"v-{party}.ckpt"

    fit_parties(2, partial(fit, "whole", None))
    paths = fit_parties(2, partial(fit, "resumed", None))
    fit_parties(2, partial(fit, "resumed", paths))
    for whole, resumed in zip(*loggers.values(), strict=True):
        assert len(whole.metrics["federated/val_loss"]) == 4
        assert whole.metrics["federated/val_loss"] == resumed.metrics["federated/val_loss"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("every_n_epochs", [1, 2])
def test_resume_from_the_checkpoint_of_a_validation(tmp_path: Path, every_n_epochs: int) -> None:
    """ModelCheckpoint saves in on_validation_end, before the epoch's own end."""
    loggers = {name: [Rounds(), Rounds()] for name in ("whole", "resumed")}

    def fit(name: str, party: int, federated: Any) -> torch.Tensor:
        directory = tmp_path / f"party-{party}"
        checkpoint = ModelCheckpoint(
            directory, "{epoch}", "federated/val_loss", save_top_k=-1, enable_version_counter=False
        )
        callback = federated(every_n_epochs=every_n_epochs, outer_optimizer=DILOCO)
        trainer = quiet_trainer(
            tmp_path,
            [checkpoint, callback],
            max_epochs=4,
            logger=loggers[name][party],
            enable_checkpointing=True,
        )
        module = ValidatedClassifier(seed=party + (0 if name == "whole" else 50), optimizer="Adam")
        path = None if name == "whole" else directory / "epoch=0.ckpt"
        trainer.fit(module, data(8 + 4 * party, seed=party), data(6, seed=20 + party), ckpt_path=path)
        return module.vector()

    whole = fit_parties(2, partial(fit, "whole"))
    resumed = fit_parties(2, partial(fit, "resumed"))
    assert all(torch.equal(whole[0], vector) for vector in (*whole, *resumed))
    for one, other in zip(*loggers.values(), strict=True):
        assert one.metrics["federated/val_loss"][1:] == other.metrics["federated/val_loss"]
        assert [done["step"] for done in one.rounds][2 - every_n_epochs :] == other.steps


def test_misconfiguration_is_still_lightnings(tmp_path: Path) -> None:
    """Lightning's own check of a checkpoint stays in charge: too few epochs."""
    (path,) = save(tmp_path, "few", parties=1)

    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=1)
        trainer.fit(Classifier(optimizer="Adam"), data(8, seed=0), ckpt_path=path)

    with pytest.raises(MisconfigurationException, match="max_epochs=1"):
        fit_parties(1, fit)


def test_a_checkpoint_of_another_party_is_refused_by_all(tmp_path: Path) -> None:
    def first(party: int, federated: Any) -> None:
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=1)
        trainer.fit(Classifier(seed=party), data(8, seed=party))
        trainer.save_checkpoint(tmp_path / f"party-{party}.ckpt")

    def second(party: int, federated: Any) -> None:
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=2)
        trainer.fit(Classifier(seed=party), data(8, seed=party), ckpt_path=str(tmp_path / "party-0.ckpt"))

    fit_parties(2, first)
    told, refused = fit_parties(2, second, may_fail=True)
    assert "Party 1 resumes a checkpoint that party 0 has saved" in str(refused)
    assert "ckpt_path='.../party-1/...'" in str(refused)
    assert "Party 1 left the federation" in str(told)
