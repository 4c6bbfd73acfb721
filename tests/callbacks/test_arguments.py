"""What is refused, in words: arguments, Trainers, samplers, checkpoints."""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from party_threads import Classifier, ValidatedClassifier, data, dataset, fit_parties, quiet_trainer
from torch.utils.data import DataLoader, DistributedSampler

from pellm_lightning import FederatedAveraging, Overlap, Parameters, SeparateJobs, Weighting
from pellm_lightning.callbacks import arguments
from pellm_lightning.comm.topology import Topology

# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_epochs": 1, "every_n_steps": 1}, "every_n_epochs=1 and every_n_steps=1 are both given"),
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be at least 1"),
        ({"every_n_steps": -3}, "every_n_steps=-3 must be at least 1"),
        ({"weighting": "sample"}, "weighting='sample' must be one of 'samples', 'uniform'"),
        ({"weighting": -0.5}, "weighting=-0.5 must be 'samples', 'uniform' or a number of 0 to"),
        ({"weighting": math.nan}, "weighting=nan must be"),
        ({"weighting": math.inf}, "weighting=inf must be"),
        ({"weighting": True}, "weighting=True must be"),
        ({"weighting": None}, "weighting=None must be"),
        ({"parameters": {"include": "*lora*"}}, r"include='\*lora\*' must be a list of glob patterns"),
        ({"parameters": {"exclude": [1]}}, r"exclude=\[1\] must be a list of glob patterns"),
        ({"parameters": {"exclude": {"head"}}}, r"exclude=\{'head'\} must be a list of glob patterns"),
        ({"inner_optimizer_state": "clear"}, "inner_optimizer_state='clear' must be one of 'keep', 'reset'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore' must be one of 'exclude', 'raise'"),
        ({"aggregation": "mean"}, r"aggregation='mean' must be of the class Aggregation, or left out"),
        ({"privacy": 1.0}, r"privacy=1\.0 must be of the class GaussianMechanism, or left out"),
        ({"overlap": 4}, r"overlap=4 must be of the class Overlap, or left out"),
        ({"jobs": "jobs/a.yaml"}, r"jobs='jobs/a\.yaml' must be of the class SeparateJobs, or left out"),
        ({"timeout_s": 0}, "timeout_s=0 must be positive, in seconds"),
        ({"timeout_s": math.nan}, "timeout_s=nan must be positive"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedAveraging(
            **{key: Parameters(**value) if key == "parameters" else value for key, value in arguments.items()}
        )


@pytest.mark.parametrize("weighting", ["samples", "uniform", 0, 2, 0.25])
def test_good_weightings(weighting: Any) -> None:
    assert FederatedAveraging(weighting=weighting).weighting == weighting


def test_arguments_are_attributes_under_the_same_name() -> None:
    # jsonargparse and Lightning's save_hyperparameters read them back.
    arguments: dict[str, Any] = {
        "every_n_steps": 7,
        "weighting": 2.0,
        "outer_optimizer": torch.optim.Adam,
        "inner_optimizer_state": "reset",
        "on_nonfinite": "raise",
        "timeout_s": 5,
        "overlap": Overlap(delay_steps=2),
        "parameters": Parameters(include=("a",), exclude=["b"], check_frozen=False, save_frozen=False),
        "jobs": SeparateJobs("tcp://127.0.0.1:1", "a", ("a", "b")),
    }
    callback = FederatedAveraging(**arguments)
    assert {name: getattr(callback, name) for name in arguments} == arguments


# ---- the Trainer


def trainer_with(strategy: Any, callbacks: Any = ()) -> Any:
    return SimpleNamespace(strategy=strategy, callbacks=list(callbacks))


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_finders_are_warned_about(finder: Any) -> None:
    trainer = trainer_with(SingleDeviceStrategy(torch.device("cpu")), [finder()])
    with pytest.warns(UserWarning, match=f"{finder.__name__} searches at each party alone"):
        arguments.trainer(trainer, FederatedAveraging())


class Own(FederatedAveraging):
    """A class of a user's."""


def pair(*made: Any) -> list[Callback]:
    return [make() for make in made]


def twice() -> list[Callback]:
    return [FederatedAveraging()] * 2


TWO = [
    partial(pair, first, second)
    for first in (FederatedAveraging, Own)
    for second in (FederatedAveraging, Own)
]


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("two", [*TWO, twice])
def test_two_of_our_callbacks_are_refused(tmp_path: Path, two: Any, verb: str) -> None:
    class Complete(ValidatedClassifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    trainer = quiet_trainer(tmp_path, two(), enable_checkpointing=verb == "fit")
    with pytest.raises(MisconfigurationException, match=r"has 2 callbacks that federate \(.*Keep one"):
        getattr(trainer, verb)(Classifier() if verb == "fit" else Complete(), data(4, seed=0))
    assert not (tmp_path / "checkpoints").exists()


def test_a_second_one_from_the_module_is_refused(tmp_path: Path) -> None:
    class Bringing(Classifier):
        def configure_callbacks(self) -> list[Callback]:
            return [FederatedAveraging()]  # which replaces no callback of a derived class

    with pytest.raises(MisconfigurationException, match=r"\(Own, FederatedAveraging\).*configure_callbacks"):
        quiet_trainer(tmp_path, [Own()]).fit(Bringing(), data(4, seed=0))


def test_the_key_of_the_state_is_the_class(tmp_path: Path) -> None:
    """Whatever it was before: a checkpoint can be resumed by another process."""
    trainer = quiet_trainer(tmp_path, [FederatedAveraging()], max_epochs=1)
    trainer.fit(Classifier(), data(4, seed=0))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert list(torch.load(tmp_path / "x.ckpt")["callbacks"]) == ["FederatedAveraging"]


# ---- data


def loader_with(replicas: int) -> DataLoader:
    samples = dataset(8, seed=0)
    return DataLoader(samples, batch_size=2, sampler=DistributedSampler(samples, replicas, rank=0))


@pytest.mark.parametrize(
    "nested",
    [
        lambda loader: loader,
        lambda loader: [data(4, seed=0), loader],
        lambda loader: {"a": data(4, seed=0), "b": {"c": loader}},
    ],
)
def test_a_sampler_that_cuts_private_data_is_found(nested: Any) -> None:
    trainer: Any = SimpleNamespace(train_dataloader=nested(loader_with(3)))
    with pytest.raises(MisconfigurationException) as caught:
        arguments.samplers(trainer, Topology(2, 3, 0, 1))
    assert "The training DataLoader of party 2 has a DistributedSampler over 3 replicas" in str(caught.value)
    assert "Remove the sampler" in str(caught.value)
    trainer.train_dataloader = nested(loader_with(2))
    arguments.samplers(trainer, Topology(2, 3, 0, 2))  # the party's own two processes


@pytest.mark.parametrize("combined", [False, True])
def test_a_sampler_over_parties_is_refused_everywhere(tmp_path: Path, combined: bool) -> None:
    def fit(party: int, federated: Any) -> None:
        loader: Any = loader_with(2) if party else data(8, seed=party)
        if combined and party:
            loader = CombinedLoader({"one": loader, "two": data(8, seed=1)})
        quiet_trainer(tmp_path, [federated()]).fit(Classifier(seed=party), loader)

    told, own = fit_parties(2, fit, may_fail=True)
    assert "The training DataLoader of party 1 has a DistributedSampler" in str(own)
    assert "Party 1 left the federation" in str(told)
    assert "DistributedSampler" in str(told)


# ---- optimizers, devices, checkpoints


def test_federated_parameters_without_an_optimizer_are_warned_about() -> None:
    module = Classifier()
    trainer: Any = SimpleNamespace(optimizers=[torch.optim.SGD([module.head.weight], lr=0.1)])
    with pytest.warns(
        UserWarning, match=r"1 federated parameter\(s\) are in no optimizer, the first is 'bias'"
    ):
        arguments.optimizers(trainer, dict(module.head.named_parameters()))
    trainer.optimizers.append(torch.optim.SGD([module.head.bias], lr=0.1))
    arguments.optimizers(trainer, dict(module.head.named_parameters()))


def test_parties_on_one_accelerator_are_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"same accelerator.*--virtual-local-rank"):
        arguments.devices(["host:gpu-a", "host:gpu-b", "host:gpu-a"])
    arguments.devices(["host:gpu-a", "host:gpu-b"])
    arguments.devices([None, None])


def test_weights_only_checkpoints_are_warned_about() -> None:
    def trainer(weights_only: bool) -> Any:
        checkpoint = ModelCheckpoint(save_weights_only=weights_only)
        return trainer_with(SingleDeviceStrategy(torch.device("cpu")), [checkpoint])

    with pytest.warns(UserWarning, match=r"save_frozen=False has no effect on its files.*Drop one"):
        arguments.checkpoints(trainer(True))
    arguments.checkpoints(trainer(False))


@pytest.mark.filterwarnings("ignore:ModelCheckpoint.save_weights_only=True.:UserWarning")
@pytest.mark.parametrize("weights_only", [True, False])
def test_such_checkpoints_hold_what_is_frozen(tmp_path: Path, weights_only: bool) -> None:
    """What the warning says is so; without save_weights_only it is not."""

    def fit(party: int, federated: Any) -> list[str]:
        checkpoint = ModelCheckpoint(tmp_path, save_weights_only=weights_only)
        trainer = quiet_trainer(
            tmp_path,
            [federated(parameters=Parameters(save_frozen=False)), checkpoint],
            max_epochs=1,
            enable_checkpointing=True,
        )
        trainer.fit(Classifier(), data(4, seed=0))
        return sorted(torch.load(checkpoint.best_model_path)["state_dict"])

    frozen = ["base.bias", "base.weight"] if weights_only else []
    assert fit_parties(1, fit) == [[*frozen, "head.bias", "head.weight"]]


def test_a_checkpoint_of_trainables_must_match() -> None:
    module = Classifier()
    full = module.state_dict()
    trainable = {name: full[name] for name in ("head.weight", "head.bias")}
    left_out = full.keys() - trainable.keys()
    arguments.trainable_checkpoint(module, trainable, left_out)
    arguments.trainable_checkpoint(module, full, left_out)
    with pytest.raises(ValueError, match=r"lacks the parameter 'head.weight' \(2 in all\)"):
        arguments.trainable_checkpoint(module, {}, left_out)
    with pytest.raises(ValueError, match=r"holds the unknown parameter 'lora' \(1 in all\)"):
        arguments.trainable_checkpoint(module, trainable | {"lora": torch.zeros(1)}, left_out)


@pytest.mark.parametrize("by", ["samples", "uniform", 0, 2, 0.25])
@pytest.mark.parametrize("max_share", [None, 0.3, 1])
def test_good_weightings_with_a_cap(by: Any, max_share: float | None) -> None:
    weighting = Weighting(by, max_share)
    assert FederatedAveraging(weighting=weighting).weighting == weighting


@pytest.mark.parametrize("max_share", [0, -0.1, 1.01, math.nan, True, "0.3"])
def test_a_cap_is_a_share(max_share: Any) -> None:
    with pytest.raises(ValueError, match=r"max_share=.* must be above 0 and at most 1"):
        Weighting("samples", max_share)


@pytest.mark.parametrize("by", ["sample", -1, math.nan, True, None, Weighting()])
def test_a_weighting_is_one_of_its_kinds(by: Any) -> None:
    with pytest.raises(ValueError, match=r"weighting=.* must be"):
        Weighting(by)
