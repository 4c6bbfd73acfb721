"""A simulation in a fit: whose random numbers and state a party has, exact resuming, and what is refused."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lora_module import Tuned, assert_same
from party_threads import Classifier, ValidatedClassifier, data, dataset, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from pellm_lightning import FederatedAveraging, Overlap, Simulation
from pellm_lightning.aggregation import ResidualMean, ShareA
from pellm_lightning.callbacks.drift import SCAFFOLD
from pellm_lightning.exchange import Cast, SecureAggregation
from pellm_lightning.privacy import GaussianMechanism

FROZEN = partial(torch.optim.SGD, lr=0.0)
"""An outer optimizer that leaves the global parameters as they are."""

pytestmark = pytest.mark.filterwarnings("ignore:No launcher found")


class Shuffled(LightningDataModule):
    """Batches in an order that a party's random numbers decide; party k has 8, 12, 16, 8, ... samples."""

    def party_dataloader(self, party: int) -> Any:
        return DataLoader(dataset(8 + party % 3 * 4, seed=party), batch_size=4, shuffle=True)


class Dropping(Tuned):
    """A module that draws random numbers in each step, and whose learning rate falls with each."""

    def __init__(self) -> None:
        super().__init__(0, lora_dropout=0.5)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def alone(party: int, simulation: Simulation, rounds: int, steps: int) -> Iterator[float]:
    """Yield a party's losses, round by round, as it trains by itself and each round takes all of it back."""
    module = Dropping()
    before = {name: p.detach().clone() for name, p in module.trained().items()}
    both = module.configure_optimizers()
    optimizer, scheduler = both["optimizer"], both["lr_scheduler"]["scheduler"]
    torch.manual_seed(simulation.party_seed(party))
    loader = Shuffled().party_dataloader(party)
    batches = itertools.chain.from_iterable(loader for _ in itertools.count())
    for number in range(rounds):
        if party not in simulation.draw(number).training:
            continue
        total, samples = 0.0, 0
        for x, y in itertools.islice(batches, steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            total, samples = total + float(loss.detach()) * len(x), samples + len(x)
        with torch.no_grad():
            for name, parameter in module.trained().items():
                parameter.copy_(before[name])
        yield total / samples


def test_each_party_has_its_own_moments_schedule_random_numbers_and_place_in_its_data(tmp_path: Path) -> None:
    """With an outer learning rate of 0 no party sees anything of another."""
    simulation = Simulation(num_parties=4, sampled=3, seed=2, memory_gb=0)
    callback = FederatedAveraging(every_n_steps=2, simulate=simulation, outer_optimizer=FROZEN)
    quiet_trainer(tmp_path, [callback], max_epochs=6).fit(Dropping(), datamodule=Shuffled())
    found: dict[int, list[float]] = {party: [] for party in range(4)}
    for report in callback.rounds:
        for party, loss in zip(report.parties, report.losses, strict=True):
            found[party].append(float(loss or 0))
    for party, losses in found.items():
        assert losses == pytest.approx([*alone(party, simulation, 6, 2)], abs=1e-6)
    assert sum(map(len, found.values())) == 18
    assert not [*(tmp_path / "party-0").rglob("*.pt")], "nothing is left on disk"


class Saving(Callback):
    """Saves a checkpoint after each batch, and one at the end of each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("schedule", [{"every_n_steps": 2}, {"every_n_epochs": 1}])
def test_resuming_is_exact_wherever_the_checkpoint_was_saved(
    schedule: dict[str, int], tmp_path: Path
) -> None:
    simulation = Simulation(num_parties=4, sampled=3, seed=1, memory_gb=0)  # passes are 7, 9 and 8 batches

    def fit(folder: Path, callbacks: list[Callback], ckpt_path: Path | None = None) -> Any:
        callback = FederatedAveraging(
            **schedule,
            aggregation=ShareA(),
            simulate=simulation,
            outer_optimizer=partial(torch.optim.SGD, lr=0.7, momentum=0.9),
        )
        module = Dropping()
        trainer = quiet_trainer(folder, [callback, *callbacks], max_epochs=3)
        torch.manual_seed(5 if ckpt_path is None else 6)
        trainer.fit(module, datamodule=Shuffled(), ckpt_path=ckpt_path)
        return module.of(""), callback.rounds, trainer.global_step

    whole, rounds, steps = fit(tmp_path / "whole", [Saving(tmp_path)])
    drawn = [simulation.draw(number).parties for number in range(3)]
    lengths = [sum(2 if "every_n_steps" in schedule else 2 + p % 3 for p in parties) for parties in drawn]
    first, second, _ = itertools.accumulate(lengths)
    assert steps == sum(lengths)
    # Within a turn, between two turns, at the end of a round, of an epoch, and within the round after it.
    for name in (1, 2, 3, first, "epoch-0", first + 1, second):
        resumed, later, ended_at = fit(tmp_path / f"from-{name}", [], tmp_path / f"{name}.ckpt")
        assert ended_at == steps, name
        assert_same(resumed, whole)
        for mine, other in zip(later[::-1], rounds[::-1], strict=False):
            assert (mine.round, mine.parties, mine.losses) == (other.round, other.parties, other.losses), name


@pytest.mark.parametrize(("stop_at", "trained"), [(1, 1), (2, 1), (3, 2), (6, 3), (7, 1)])
def test_a_fit_that_is_stopped_within_a_round_closes_it(tmp_path: Path, stop_at: int, trained: int) -> None:
    """Each of three parties makes two steps: with the second turn not begun one has trained."""

    class Stopping(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == stop_at

    simulation = Simulation(num_parties=4, sampled=3, seed=2)
    callback = FederatedAveraging(
        every_n_steps=2, simulate=simulation, weighting="uniform", quorum=1, outer_optimizer=FROZEN
    )
    trainer = quiet_trainer(tmp_path, [callback, Stopping()], max_epochs=4)
    trainer.fit(Dropping(), datamodule=Shuffled())
    assert trainer.global_step == stop_at
    last = callback.rounds[-1]
    assert len(callback.rounds) == (1 if stop_at <= 6 else 2)
    assert (last.trained_parties, last.total_weight) == (trained, trained)
    assert [party for party, weight in zip(last.parties, last.weights, strict=True) if weight] == [
        *simulation.draw(last.round).parties[:trained]
    ]


def test_a_checkpoint_of_other_parties_is_refused(tmp_path: Path) -> None:
    def fit(callback: FederatedAveraging, ckpt_path: Path | None = None, **given: Any) -> None:
        trainer = quiet_trainer(tmp_path, [callback], max_epochs=1 if ckpt_path is None else 2)
        given = given or {"datamodule": Shuffled()}
        trainer.fit(Classifier(), ckpt_path=ckpt_path, **given)
        trainer.save_checkpoint(tmp_path / ("of_parties.ckpt" if "datamodule" in given else "plain.ckpt"))

    fit(FederatedAveraging(simulate=Simulation(6, 2)))
    fit(FederatedAveraging(), train_dataloaders=data(8, seed=1))
    with pytest.raises(MisconfigurationException, match=r"num_parties=6, sampled=2.*num_parties=7"):
        fit(FederatedAveraging(simulate=Simulation(7, 2)), tmp_path / "of_parties.ckpt")
    with pytest.raises(MisconfigurationException, match="simulate=None"):
        fit(FederatedAveraging(simulate=Simulation(6, 2)), tmp_path / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match="is of a simulation"):
        fit(FederatedAveraging(), tmp_path / "of_parties.ckpt", train_dataloaders=data(8, seed=1))
    fit(FederatedAveraging(simulate=Simulation(6, 2, memory_gb=1)), tmp_path / "of_parties.ckpt")


def test_validation_sees_the_global_parameters(tmp_path: Path) -> None:
    class Data(Shuffled):
        def val_dataloader(self) -> Any:
            return data(8, seed=99)

    class Seen(ValidatedClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []

        def on_validation_epoch_start(self) -> None:
            self.seen.append(self.vector())

    class Global(Callback):
        def __init__(self) -> None:
            self.vectors: list[torch.Tensor] = []

        def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
            self.vectors.append(module.vector())

    module, callback, after = Seen(), FederatedAveraging(simulate=Simulation(6, 2)), Global()
    trainer = quiet_trainer(tmp_path, [callback, after], max_epochs=3)
    trainer.fit(module, datamodule=Data())
    assert [torch.equal(*both) for both in zip(module.seen, after.vectors, strict=True)] == [True] * 3
    assert "federated/val_loss" in trainer.callback_metrics
    assert trainer.reload_dataloaders_every_n_epochs == 0, "the Trainer is as it was"


def test_a_data_module_is_as_it_was_after_a_fit(tmp_path: Path) -> None:
    module = Shuffled()
    for _ in range(2):
        callback = FederatedAveraging(simulate=Simulation(6, 2))
        quiet_trainer(tmp_path, [callback], max_epochs=1).fit(Classifier(), datamodule=module)
        assert "train_dataloader" not in vars(module)
    with pytest.raises(MisconfigurationException, match="train_dataloader"):
        quiet_trainer(tmp_path).fit(Classifier(), datamodule=module)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"every_n_seconds": 5.0}, "one after another"),
        ({"every_n_steps": 4, "overlap": Overlap(delay_steps=1)}, "overlap"),
        ({"privacy": GaussianMechanism(1.0, 0.5), "weighting": "uniform"}, "sampled"),
        ({"exchange": SecureAggregation()}, "Plain()"),
        ({"exchange": Cast("bfloat16")}, "Plain()"),
    ],
)
def test_arguments_that_do_not_go_with_it(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FederatedAveraging(simulate=Simulation(6, 2), **arguments)


def test_what_is_no_simulation() -> None:
    with pytest.raises(ValueError, match="class Simulation"):
        FederatedAveraging(simulate=10)  # type: ignore[arg-type]


class Averaged(WeightAveraging):
    pass


class ByEpoch(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Empty(Shuffled):
    def party_dataloader(self, party: int) -> Any:
        return []


class Endless(Shuffled):
    def party_dataloader(self, party: int) -> Any:
        return (batch for batch in super().party_dataloader(party))


@pytest.mark.parametrize(
    ("settings", "module", "datamodule", "said"),
    [
        ({"accumulate_grad_batches": 2}, Classifier, Shuffled, "different parties"),
        ({"max_steps": 9, "max_epochs": None}, Classifier, Shuffled, "max_epochs"),
        ({"limit_train_batches": 2}, Classifier, Shuffled, "limit_train_batches=2"),
        ({"val_check_interval": 0.5}, Classifier, Shuffled, "single party's"),
        ({"callbacks": [SCAFFOLD()]}, Classifier, Shuffled, "SCAFFOLD"),
        ({"callbacks": [Averaged()]}, Classifier, Shuffled, "Averaged"),
        ({}, Manual, Shuffled, "automatic_optimization"),
        ({}, ByEpoch, Shuffled, "interval"),
        ({}, Classifier, Empty, "no batch"),
        ({}, Classifier, Endless, "every_n_steps"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    settings: dict[str, Any], module: Any, datamodule: Any, said: str, tmp_path: Path
) -> None:
    callback = FederatedAveraging(simulate=Simulation(6, 2))
    trainer = quiet_trainer(tmp_path, [callback, *settings.pop("callbacks", [])], **settings)
    with pytest.raises(MisconfigurationException, match=said):
        trainer.fit(module(), datamodule=datamodule())
    assert callback.rounds == []


def test_data_of_no_party_are_refused(tmp_path: Path) -> None:
    class Single(LightningDataModule):
        def train_dataloader(self) -> Any:
            return data(8, seed=1)

    for given in ({"datamodule": Single()}, {"train_dataloaders": data(8, seed=1)}):
        trainer = quiet_trainer(tmp_path, [FederatedAveraging(simulate=Simulation(6, 2))])
        with pytest.raises(MisconfigurationException, match="party_dataloader"):
            trainer.fit(Classifier(), **given)


def test_a_rule_that_writes_into_the_base_is_refused(tmp_path: Path) -> None:
    callback = FederatedAveraging(simulate=Simulation(6, 2), aggregation=ResidualMean())
    with pytest.raises(MisconfigurationException, match="one copy for all"):
        quiet_trainer(tmp_path, [callback]).fit(Tuned(0), datamodule=Shuffled())
