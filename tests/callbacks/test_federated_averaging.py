"""FederatedAveraging under real Trainers, parties as threads: what a round computes."""

import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fedavg_oracle import fedavg
from party_threads import (
    Classifier,
    Connecting,
    Rounds,
    ValidatedClassifier,
    batches,
    data,
    fit_parties,
    quiet_trainer,
)
from torch import nn

from pellm_lightning import FederatedAveraging, Parameters

SGD, Adam = torch.optim.SGD, torch.optim.Adam


def test_parties_end_with_the_same_bits_however_uneven(tmp_path: Path) -> None:
    samples, epochs = (16, 8, 28), (2, 4, 1)

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party)
        trainer = quiet_trainer(tmp_path, [federated(every_n_steps=3)], max_epochs=epochs[party])
        trainer.fit(module, data(samples[party], seed=party))
        return module.vector()

    first, *others = fit_parties(3, fit)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (2, 8, 5)], ids=["equal", "uneven"])
def test_one_local_step_equals_central_sgd_on_the_union(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    # The loss is a mean over samples, so the union's gradient is the sample-weighted mean of the parties'.
    loaders = [data(size, seed=party, batch_size=size) for party, size in enumerate(sizes)]
    union = [torch.cat(parts) for parts in zip(*(next(iter(loader)) for loader in loaders), strict=True)]
    central = fedavg(Classifier(seed=0), [[union]], rounds=1, steps=1, weights=[[1]])

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party)
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(module, loaders[party])
        return module.vector()

    for vector in fit_parties(3, fit):
        # Numbers below 2 after about ten roundings of half an ulp, 2^-24 relative each: 2 * 10 * 6e-8.
        torch.testing.assert_close(vector.double(), central, rtol=0, atol=1.2e-6)


INNER = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "adam": partial(Adam, lr=0.01),
}
OUTER = {
    "fedavg": partial(SGD, lr=1.0),
    "fedavgm": partial(SGD, lr=1.0, momentum=0.9),
    "diloco": partial(SGD, lr=0.7, momentum=0.9, nesterov=True),
    "fedadam": partial(Adam, lr=0.05, eps=1e-3),
}


@pytest.mark.parametrize(
    ("inner", "state", "outer", "weighting"),
    [
        ("sgd", "keep", "fedavg", "samples"),
        ("sgd", "keep", "fedavg", "uniform"),
        ("sgd", "keep", "fedavg", (3.0, 0.0, 0.5)),
        ("momentum", "keep", "fedavg", "samples"),
        ("momentum", "reset", "fedavg", "samples"),
        ("adam", "keep", "fedavg", "samples"),
        ("adam", "reset", "fedavg", "samples"),
        ("sgd", "keep", "fedavgm", "samples"),
        ("adam", "keep", "diloco", "uniform"),
        ("sgd", "keep", "fedadam", "samples"),
    ],
)
def test_rounds_equal_fedavg_in_float64(
    tmp_path: Path, inner: str, state: Any, outer: str, weighting: Any
) -> None:
    # Three rounds, so each write-back must survive the optimizer steps that follow it.
    sizes = ((4, 2, 1, 4, 3, 2), (8, 8, 1, 2, 5, 5), (1, 1, 1, 1, 1, 9))
    samples = [[sum(own[2 * r : 2 * r + 2]) for own in sizes] for r in range(3)]
    weights = {"samples": samples, "uniform": [[1, 1, 1]] * 3}.get(str(weighting), [weighting] * 3)
    loaders = [batches(own, seed=party) for party, own in enumerate(sizes)]
    expected = fedavg(
        Classifier(seed=0),
        [list(loader) for loader in loaders],
        rounds=3,
        steps=2,
        weights=weights,
        inner=INNER[inner],
        reset=state == "reset",
        outer=OUTER[outer],
    )

    class Own(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return INNER[inner](self.head.parameters())

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Own(seed=party)
        callback = federated(
            every_n_steps=2,
            weighting=weighting if isinstance(weighting, str) else weighting[party],
            inner_optimizer_state=state,
            outer_optimizer=OUTER[outer],
        )
        quiet_trainer(tmp_path, [callback], max_epochs=1).fit(module, loaders[party])
        return module.vector()

    for vector in fit_parties(3, fit):
        # Six steps of about ten roundings (2^-24) of numbers below 2; Adam divides by root mean squares of
        # about 0.1, which magnifies a gradient's error tenfold.
        torch.testing.assert_close(vector.double(), expected, rtol=0, atol=7e-6 if "sgd" in inner else 7e-5)


def test_references_differ_where_the_test_above_tells_them_apart() -> None:
    """The oracle itself depends on each option, by far more than the tolerance."""
    own = [list(batches((4, 2, 1, 4), seed=party)) for party in range(2)]
    base: dict[str, Any] = {"rounds": 2, "steps": 2, "weights": [[1, 1]] * 2}
    vectors = [
        fedavg(Classifier(seed=0), own, **base | change)
        for change in (
            {},
            {"weights": [[1, 3]] * 2},
            {"inner": INNER["momentum"]},
            {"inner": INNER["momentum"], "reset": True},
            {"inner": INNER["adam"]},
            {"inner": INNER["adam"], "reset": True},
            *({"outer": OUTER[name]} for name in ("fedavgm", "diloco", "fedadam")),
        )
    ]
    for index, vector in enumerate(vectors):
        assert all((vector - other).abs().max() > 1e-3 for other in vectors[:index])


def test_samples_count_per_round_and_never_add_up(tmp_path: Path) -> None:
    sizes = ((4, 4, 1), (2, 6, 3))
    loggers = [Rounds(), Rounds()]

    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(tmp_path, [federated(every_n_steps=1)], max_epochs=1, logger=loggers[party])
        trainer.fit(Classifier(seed=party), batches(sizes[party], seed=party))

    fit_parties(2, fit)
    assert [done["weight"] for done in loggers[0].rounds] == [4, 4, 1]
    assert [done["weight"] for done in loggers[1].rounds] == [2, 6, 3]
    assert [done["total_weight"] for done in loggers[1].rounds] == [6, 10, 4]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_federated_loss_is_the_weighted_mean_of_the_parties_losses(
    tmp_path: Path, accumulate: int, weighting: Any
) -> None:
    sizes = ((4, 4, 1), (8, 2))
    loggers = [Rounds(), Rounds()]

    class Recording(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.seen.append((float(loss.detach()), len(batch[0])))
            return loss

    def fit(party: int, federated: Any) -> list[tuple[float, int]]:
        module = Recording(seed=party)
        module.seen = []
        trainer = quiet_trainer(
            tmp_path,
            [federated(weighting=weighting)],
            max_epochs=1,
            logger=loggers[party],
            accumulate_grad_batches=accumulate,
        )
        trainer.fit(module, batches(sizes[party], seed=party))
        return module.seen

    first, second = fit_parties(2, fit)
    sums = [sum(loss * n for loss, n in seen) for seen in (first, second)]
    # By samples it is one mean over all 9 + 10 samples; else each party's mean counts alike.
    expected = sum(sums) / 19 if weighting == "samples" else (sums[0] / 9 + sums[1] / 10) / 2
    for logger in loggers:
        assert [done["loss"] for done in logger.rounds] == pytest.approx([expected], rel=1e-6)


def test_reset_clears_inner_state_only_at_a_round(tmp_path: Path) -> None:
    class Watching(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.steps_known.append([int(s["step"]) for s in self.optimizers().state.values()])

    def fit(party: int, federated: Any) -> list[list[int]]:
        module = Watching(seed=party, optimizer="Adam")
        module.steps_known = []
        callback = federated(every_n_steps=2, inner_optimizer_state="reset")
        quiet_trainer(tmp_path, [callback], max_epochs=1).fit(module, data(12, seed=party, batch_size=4))
        return module.steps_known

    # Weight and bias have stepped once before the second batch; the round then cleared them.
    assert fit_parties(2, fit) == [[[], [1, 1], []]] * 2


class TwoLayers(Classifier):
    """The base trains, too."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.base.requires_grad_(True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("patterns", "shared"),
    [
        ({"parameters": Parameters(exclude=["head.*"])}, {"base.weight", "base.bias"}),
        ({"parameters": Parameters(include=["*.weight"])}, {"base.weight", "head.weight"}),
        ({"parameters": Parameters(include=["head.*"], exclude=["*.bias"])}, {"head.weight"}),
    ],
)
def test_excluded_parameters_stay_local_and_are_checkpointed(
    tmp_path: Path, patterns: dict[str, list[str]], shared: set[str]
) -> None:
    def fit(party: int, federated: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        module = TwoLayers(seed=party)
        trainer = quiet_trainer(tmp_path, [federated(**patterns)], max_epochs=1)
        trainer.fit(module, data(8, seed=party))
        path = tmp_path / f"{party}.ckpt"
        trainer.save_checkpoint(path)
        return dict(module.state_dict()), torch.load(path)["state_dict"]

    (first, saved), (second, _) = fit_parties(2, fit)
    assert {name for name in first if torch.equal(first[name], second[name])} == shared
    assert saved.keys() == first.keys()
    assert all(torch.equal(saved[name], first[name]) for name in saved)


def test_two_fits_with_one_callback(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> list[torch.Tensor]:
        callback, logger = federated(), Rounds()
        vectors = []
        for seed in (0, 10):
            module = Classifier(seed=seed + party)
            trainer = quiet_trainer(tmp_path, [callback], max_epochs=1, logger=logger)
            trainer.fit(module, data(8, seed=seed + party))
            vectors.append(module.vector())
        assert [done["round"] for done in logger.rounds] == [0, 0], "each fit counts its own rounds"
        return vectors

    for first, second in zip(*fit_parties(2, fit), strict=True):
        assert torch.equal(first, second)


def test_a_trainer_that_goes_on_federates_again(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> tuple[torch.Tensor, list[int]]:
        module, logger = Classifier(seed=party), Rounds()
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=1, logger=logger)
        trainer.fit(module, data(8, seed=party))
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data(8, seed=party))
        return module.vector(), logger.steps

    (first, steps), (second, _) = fit_parties(2, fit)
    assert torch.equal(first, second)
    assert steps == [2, 4]


def test_one_party_trains_as_if_alone(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=3, optimizer="Adam")
        quiet_trainer(tmp_path, [federated(every_n_steps=2)]).fit(module, data(20, seed=5))
        return module.vector()

    (federated,) = fit_parties(1, fit)
    alone = Classifier(seed=3, optimizer="Adam")
    quiet_trainer(tmp_path).fit(alone, data(20, seed=5))
    # x - 0 = x, and anchor - (anchor - x) is x again up to one rounding of each.
    torch.testing.assert_close(federated, alone.vector(), rtol=0, atol=1e-5)


def test_fast_dev_run_runs_one_round(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> tuple[torch.Tensor, float]:
        module = ValidatedClassifier(seed=party)
        trainer = quiet_trainer(tmp_path, [federated(every_n_steps=100)], fast_dev_run=True)
        trainer.fit(module, data(16, seed=party), data(8, seed=9))
        return module.vector(), float(trainer.callback_metrics["federated/round"])

    (first, rounds), (second, _) = fit_parties(2, fit)
    assert torch.equal(first, second)
    assert rounds == 0


def test_validate_test_and_predict_wait_for_nobody(tmp_path: Path) -> None:
    class Tested(ValidatedClassifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self(batch[0])

    def refuse() -> Any:
        raise AssertionError("only a fit may join the federation")

    trainer = quiet_trainer(tmp_path, [Connecting(refuse)])
    module = Tested()
    assert set(trainer.validate(module, data(8, seed=0), verbose=False)[0]) == {"val_loss"}
    assert set(trainer.test(module, data(8, seed=0), verbose=False)[0]) == {"test_loss"}
    assert len(trainer.predict(module, data(8, seed=0))) == 2


def test_after_the_fit_the_callback_holds_its_state_but_not_the_module(tmp_path: Path) -> None:
    callbacks: list[FederatedAveraging] = []

    def fit(party: int, federated: Any) -> Any:
        module = Classifier(seed=party)
        callbacks.append(federated())
        quiet_trainer(tmp_path, [callbacks[-1]], max_epochs=1).fit(module, data(8, seed=party))
        return weakref.ref(module.head.weight)

    references = fit_parties(2, fit)
    for callback in callbacks:
        del callback.log, callback.log_dict  # the module's methods, which Lightning puts into any callback
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert [callback.state_dict()["aggregator"]["round"] for callback in callbacks] == [1, 1]
