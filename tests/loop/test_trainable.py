"""Layers that are unfrozen in the middle of a fit: no round may leave them out without a word."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from party_threads import Classifier, batches, data, fit_parties, quiet_trainer
from torch import nn

from pellm_lightning import FederatedAveraging, FederationError, Parameters


class Unfreezing(BaseFinetuning):
    """Freezes some layers at first, and unfreezes the base in epoch 1."""

    def __init__(self, *frozen: str) -> None:
        super().__init__()
        self.frozen = frozen

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([getattr(pl_module, name) for name in self.frozen])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group([getattr(pl_module, n) for n in self.frozen], optimizer, lr=0.1)


class AtOnce(Classifier):
    """The optimizer knows all parameters from the start, frozen or not."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            pl_module.base.weight.requires_grad_(True)


class NewLayer(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            pl_module.more = nn.Linear(2, 2)
            trainer.optimizers[0].add_param_group({"params": pl_module.more.parameters()})


WAYS: dict[str, tuple[Any, Any, str, int, int, int]] = {
    "a parameter group is added": (Classifier, lambda: Unfreezing("base"), "base.weight", 2, 1, 2),
    "it was in the optimizer": (AtOnce, ByHand, "base.weight", 1, 1, 3),
    "a layer is added": (Classifier, NewLayer, "more.weight", 2, 1, 4),
}


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("kind", "change", "name", "count", "epoch", "step"), WAYS.values(), ids=WAYS)
def test_what_becomes_trainable_stops_all_parties(
    tmp_path: Path, kind: Any, change: Any, name: str, count: int, epoch: int, step: int, both: bool
) -> None:
    """Two steps an epoch. A changed layer is found before its first step, a new one when its epoch ends."""
    rounds: list[int] = [0, 0]

    def fit(party: int, federated: Any) -> None:
        callback = federated()
        callbacks = [callback, change()] if both or party else [callback]
        try:
            quiet_trainer(tmp_path, callbacks, max_epochs=3).fit(kind(seed=party), data(8, seed=party))
        finally:
            rounds[party] = len(callback.rounds)

    first, second = fit_parties(2, fit, may_fail=True)
    told = f"'{name}' ({count} in all) trains since epoch {epoch}, step {step}"
    assert isinstance(second, MisconfigurationException)
    assert told in str(second)
    assert f"exclude=['{name}']" in str(second)
    assert told in str(first)
    assert isinstance(first, MisconfigurationException if both else FederationError)
    assert rounds == [1, 1]


def test_nothing_trainable_at_the_start_names_the_callbacks_that_do_it(tmp_path: Path) -> None:
    callbacks = [FederatedAveraging(), Unfreezing("base", "head")]
    with pytest.raises(
        MisconfigurationException, match=r"nothing to federate.*BaseFinetuning.*whose lr is 0"
    ):
        quiet_trainer(tmp_path, callbacks).fit(AtOnce(), data(8, seed=0))


@pytest.mark.parametrize("pattern", ["base.*", "base.weight"])
def test_excluded_layers_may_be_unfrozen(tmp_path: Path, pattern: str) -> None:
    """They are frozen when the pattern is read."""

    def fit(party: int, federated: Any) -> tuple[torch.Tensor, torch.Tensor]:
        module = AtOnce(seed=party)
        quiet_trainer(
            tmp_path, [federated(parameters=Parameters(exclude=[pattern])), ByHand()], max_epochs=3
        ).fit(module, data(8, seed=party))
        return module.vector(), module.base.weight.detach().clone()

    (head, base), (other_head, other_base) = fit_parties(2, fit)
    assert torch.equal(head, other_head)
    assert not torch.equal(base, other_base), "it stays at home"


class Warming(Callback):
    """The way that the words name: the base trains from epoch 1 on, with the learning rate 0 before."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].param_groups[1]["lr"] = 0.1 if trainer.current_epoch else 0.0


def test_a_learning_rate_of_zero_until_then_is_the_way(tmp_path: Path) -> None:
    """One step a round: the base is the common one after the first, and the mean after the second."""

    class Open(Classifier):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.base.requires_grad_(True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            groups = [{"params": self.head.parameters()}, {"params": self.base.parameters(), "lr": 0.0}]
            return torch.optim.SGD(groups, lr=0.1)

    def fit(party: int, federated: Any) -> list[torch.Tensor]:
        module = Open(seed=party)
        quiet_trainer(tmp_path, [federated(), Warming()]).fit(module, batches([3 + party], seed=party))
        return [p.detach().clone() for p in (*module.head.parameters(), *module.base.parameters())]

    first, second = fit_parties(2, fit)
    assert all(map(torch.equal, first, second))
    # By hand, in float64: a round each epoch, of one step of SGD, weights 3 and 4.
    module = Open(seed=0).double()
    parameters = [*module.head.parameters(), *module.base.parameters()]
    for epoch in range(2):
        anchor = [p.detach().clone() for p in parameters]
        mean = [torch.zeros_like(p) for p in parameters]
        for party in range(2):
            (x, y), *_ = batches([3 + party], seed=party)
            grads = torch.autograd.grad(nn.functional.cross_entropy(module(x.double()), y), parameters)
            for index, (p, grad) in enumerate(zip(anchor, grads, strict=True)):
                lr = 0.1 if index < 2 or epoch else 0.0
                mean[index] += (3 + party) / 7 * (p - lr * grad)
        for p, value in zip(parameters, mean, strict=True):
            p.data.copy_(value)
    for p, expected in zip(first, parameters, strict=True):
        # Two steps of about ten roundings (2^-24) of numbers below 2.
        torch.testing.assert_close(p.double(), expected.detach(), rtol=0, atol=2.4e-6)


def test_freezing_in_the_middle_is_no_change(tmp_path: Path) -> None:
    class Freezing(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1 and pl_module.party:
                pl_module.head.bias.requires_grad_(False)

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party)
        module.party = party
        quiet_trainer(tmp_path, [federated(), Freezing()]).fit(module, data(8, seed=party))
        return module.vector()

    first, second = fit_parties(2, fit)
    assert torch.equal(first, second)
