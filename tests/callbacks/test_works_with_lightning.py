"""What Lightning users have in their Trainers and modules, together with FederatedAveraging."""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fedavg_oracle import fedavg
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities import CombinedLoader
from party_threads import Classifier, Rounds, batches, data, fit_parties, linear, quiet_trainer
from torch import nn

from pellm_lightning import FederatedAveraging, Parameters


def end(fit: Any, num_parties: int = 2) -> torch.Tensor:
    """Run ``fit`` at each party; return the vector they all end with."""
    first, *others = fit_parties(num_parties, fit)
    assert all(torch.equal(first, other) for other in others)
    return first


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("outer", [1.0, 0.7])
def test_precisions(tmp_path: Path, precision: Any, outer: float) -> None:
    """The mean is taken in float32 whatever the parameters' dtype, and rounded once, when it is written."""
    local: list[torch.Tensor] = [torch.empty(0)] * 2

    class Recording(Classifier):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            local[self.party] = self.vector().double()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Recording(seed=party)
        module.party = party
        callback = federated(outer_optimizer=partial(torch.optim.SGD, lr=outer))
        trainer = quiet_trainer(tmp_path, [callback], max_epochs=1, precision=precision)
        trainer.fit(module, batches((1, 2) if party else (4, 4), seed=party))
        return module.vector()

    vector = end(fit)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert vector.dtype == dtype
    # Party 0's parameters, as the module's conversion to its dtype rounded them; 8 and 3 samples.
    anchor = Classifier(seed=0).vector().to(dtype).double()
    expected = anchor - outer * (8 * (anchor - local[0]) + 3 * (anchor - local[1])) / 11
    # bfloat16 has 8 significant bits: half an ulp is at most 2^-8 of the value. Else a few float32 roundings.
    tolerance = 2**-8 * expected.abs() if dtype == torch.bfloat16 else torch.full_like(expected, 3e-7)
    assert ((vector.double() - expected).abs() <= tolerance + 1e-7).all()


@pytest.mark.parametrize("outer", [1.0, 0.7])
def test_the_default_dtype_does_not_matter(tmp_path: Path, outer: float) -> None:
    """People set it to bfloat16 to build a large model; what crosses and what is logged stays float32."""
    logger = Rounds()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party)
        callback = federated(outer_optimizer=partial(torch.optim.SGD, lr=outer))
        trainer = quiet_trainer(tmp_path, [callback], logger=logger if party else Rounds())
        trainer.fit(module, batches((4, 4) if party else (3, 3), seed=party))
        assert trainer.callback_metrics["federated/loss"].dtype == torch.float32
        return module.vector()

    expected = end(fit)
    torch.set_default_dtype(torch.bfloat16)
    assert torch.equal(end(fit), expected)
    first, second = logger.rounds[:2], logger.rounds[2:]
    for name in ("weight", "loss", "update_norm", "distance"):
        assert [done[name] for done in first] == [done[name] for done in second]


def test_losses_of_a_bfloat16_party_are_added_up_in_float32(tmp_path: Path) -> None:
    """257 losses of exactly 1: a sum in bfloat16 stops growing at 256 samples."""

    class One(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self(batch[0]).sum() * 0 + 1

    logger = Rounds()

    def fit(party: int, federated: Any) -> None:
        trainer = quiet_trainer(
            tmp_path, [federated()], max_epochs=1, precision="bf16-true", logger=logger if party else Rounds()
        )
        trainer.fit(One(seed=party), data(300 if party else 4, seed=party, batch_size=1))

    fit_parties(2, fit)
    assert logger.rounds[0]["loss"] == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradient_clipping_is_local(tmp_path: Path, precision: Any) -> None:
    sizes = ((4, 4), (1, 2))

    class Clipped(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.1)
            return super().step(closure)

    expected = fedavg(
        Classifier(seed=0),
        [list(batches(own, seed=party)) for party, own in enumerate(sizes)],
        rounds=2,
        steps=1,
        weights=[[4, 1], [4, 2]],
        inner=partial(Clipped, lr=1.0),
    )

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party, lr=1.0)
        trainer = quiet_trainer(
            tmp_path, [federated(every_n_steps=1)], max_epochs=1, gradient_clip_val=0.1, precision=precision
        )
        trainer.fit(module, batches(sizes[party], seed=party))
        return module.vector()

    # Forward passes in bfloat16 have 8 bits: the two clipped steps of 0.1 may turn by a few percent.
    torch.testing.assert_close(
        end(fit).double(), expected, rtol=0, atol=2e-6 if precision == "32-true" else 2e-2
    )


class TwoOptimizers(Classifier):
    """Manual optimization that steps both optimizers on every batch: global_step moves by two."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.automatic_optimization = False
        self.base.requires_grad_(True)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in (first, second):
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.base, self.head)]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    # Three batches an epoch are six steps. After 3 steps counts as after 4, the first count at or above.
    [({}, [6, 12]), ({"every_n_steps": 3}, [4, 8, 12]), ({"every_n_steps": 4}, [4, 8, 12])],
)
def test_manual_optimization_with_two_optimizers(
    tmp_path: Path, schedule: dict[str, int], steps: list[int]
) -> None:
    logger = Rounds()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = TwoOptimizers(seed=party)
        trainer = quiet_trainer(tmp_path, [federated(**schedule)], logger=logger if party else Rounds())
        trainer.fit(module, data(12, seed=party))
        return nn.utils.parameters_to_vector(module.parameters()).detach()

    end(fit)
    assert logger.steps == steps
    assert all("loss" not in done for done in logger.rounds), "manual optimization returned none"


def test_manual_optimization_may_return_its_loss(tmp_path: Path) -> None:
    seen: list[list[tuple[float, int]]] = [[], []]
    logger = Rounds()

    class Returning(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:  # type: ignore[override]
            super().training_step(batch, batch_idx)
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1]).detach()
            self.seen.append((float(loss), len(batch[0])))
            return loss

    def fit(party: int, federated: Any) -> None:
        module = Returning(seed=party)
        module.seen = seen[party]
        trainer = quiet_trainer(tmp_path, [federated()], max_epochs=1, logger=logger if party else Rounds())
        trainer.fit(module, batches((4, 1) if party else (2, 2), seed=party))

    fit_parties(2, fit)
    expected = sum(loss * n for own in seen for loss, n in own) / 9
    assert logger.rounds[0]["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.compiled
def test_a_compiled_party_agrees_with_a_plain_one(tmp_path: Path) -> None:
    """Compiling a submodule puts `_orig_mod.` into its parameters' names; that is no difference."""

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party)
        if party == 1:
            module.head = torch.compile(module.head, backend="eager")
            assert "head._orig_mod.weight" in dict(module.named_parameters())
        trainer = quiet_trainer(
            tmp_path, [federated(parameters=Parameters(include=["head.*"]))], max_epochs=2
        )
        trainer.fit(module, data(8, seed=party))
        return module.vector()

    end(fit)


@pytest.mark.compiled
def test_a_compiled_lightning_module(tmp_path: Path) -> None:
    class Silent(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])  # dynamo 2.13 trips over self.log

    def fit(compiled: bool, party: int, federated: Any) -> torch.Tensor:
        module = Silent(seed=party)
        given = torch.compile(module, backend="eager") if compiled and party == 0 else module
        trainer = quiet_trainer(tmp_path, [federated(parameters=Parameters(save_frozen=False))], max_epochs=2)
        trainer.fit(given, data(8, seed=party))
        trainer.save_checkpoint(tmp_path / f"{party}.ckpt")
        saved = torch.load(tmp_path / f"{party}.ckpt")["state_dict"]
        assert all(torch.equal(saved[f"head.{name}"], p) for name, p in module.head.named_parameters())
        return module.vector()

    assert torch.equal(end(partial(fit, True)), end(partial(fit, False)))


def test_tied_parameters_are_one(tmp_path: Path) -> None:
    class Tied(Classifier):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.body = linear(16, 16, seed=seed)
            self.twin = nn.Linear(16, 16)
            self.twin.weight = self.body.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.twin(torch.tanh(self.body(torch.tanh(self.base(x))))))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def fit(party: int, federated: Any) -> torch.Tensor:
        module, callback = Tied(seed=party), federated()
        nn.init.zeros_(module.twin.bias)
        quiet_trainer(tmp_path, [callback]).fit(module, data(8, seed=party))
        assert module.twin.weight is module.body.weight
        names = list(callback.state_dict()["aggregator"]["shapes"])
        assert names == ["body.bias", "body.weight", "head.bias", "head.weight", "twin.bias"]
        return nn.utils.parameters_to_vector(p for p in module.parameters() if p.requires_grad).detach()

    end(fit)


def test_learning_rates_are_logged_and_scheduled_through(tmp_path: Path) -> None:
    """The LR schedule goes on over the rounds: one uninterrupted fit."""

    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    logger = Rounds()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Scheduled(seed=party)
        trainer = quiet_trainer(
            tmp_path,
            [LearningRateMonitor("step"), federated()],
            max_epochs=2,
            logger=logger if party else Rounds(),
            log_every_n_steps=1,
        )
        trainer.fit(module, data(8, seed=party))
        return module.vector()

    end(fit)
    assert logger.metrics["lr-SGD"] == pytest.approx([0.1, 0.05, 0.025, 0.0125])


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_dataloader_iter_training_step(tmp_path: Path) -> None:
    class Iterating(Classifier):
        def training_step(self, dataloader_iter: Iterator[Any]) -> torch.Tensor:  # type: ignore[override]
            batch, _, _ = next(dataloader_iter)
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    logger = Rounds()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Iterating(seed=party)
        trainer = quiet_trainer(tmp_path, [federated()], logger=logger if party else Rounds())
        trainer.fit(module, batches((4, 2) if party else (3, 3), seed=party))
        return module.vector()

    end(fit)
    assert [(done["step"], done["weight"]) for done in logger.rounds] == [(2, 6), (4, 6)]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_training_step_that_skips_batches(tmp_path: Path) -> None:
    """Returning None makes no optimizer step; the party's round still comes at the end of its epoch."""

    class Skipping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    logger = Rounds()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = (Skipping if party else Classifier)(seed=party)
        quiet_trainer(tmp_path, [federated()], logger=logger if party else Rounds()).fit(
            module, data(16, seed=party)
        )
        return module.vector()

    end(fit)
    # Of two parties with batches of 4, party 0 counts 4 batches and party 1 two of them.
    assert [(done["weight"], done["total_weight"]) for done in logger.rounds] == [(8, 24)] * 2


@pytest.mark.parametrize("optimization", ["automatic", "manual"])
@pytest.mark.filterwarnings("ignore:train_dataloader yielded None", "ignore:`training_step` returned `None`")
def test_batches_that_are_none(tmp_path: Path, optimization: str) -> None:
    """Lightning skips them; a round at the end of the epoch comes all the same."""
    kind = {"automatic": Classifier, "manual": TwoOptimizers}[optimization]

    class Gaps(torch.utils.data.IterableDataset):
        def __init__(self, party: int) -> None:
            self.party = party

        def __iter__(self) -> Iterator[Any]:
            for index, batch in enumerate(batches((4, 3, 2), seed=self.party)):
                yield batch if index == 1 or self.party == 0 else None

    logger = Rounds()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = kind(seed=party)
        loader = torch.utils.data.DataLoader(Gaps(party), batch_size=None)
        quiet_trainer(tmp_path, [federated()], logger=logger if party else Rounds()).fit(module, loader)
        return nn.utils.parameters_to_vector(p for p in module.parameters() if p.requires_grad).detach()

    end(fit)
    assert [(done["weight"], done["total_weight"]) for done in logger.rounds] == [(3, 12)] * 2


class OfWords(Classifier):
    """Batches are lists of strings, of which the module makes its own tensors."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = torch.tensor([[float(word)] * 8 for word in batch])
        return nn.functional.cross_entropy(self(x), torch.zeros(len(batch), dtype=torch.long))


def as_strings(samples: list[int]) -> list[str]:
    return [str(sample) for sample in samples]


def test_batches_of_strings_weigh_what_their_loader_says(tmp_path: Path) -> None:
    """10 samples in batches of 4, 4 and 2 weigh 10."""
    logger = Rounds()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = OfWords(seed=party)
        loader = torch.utils.data.DataLoader(range(10 if party else 6), batch_size=4, collate_fn=as_strings)
        trainer = quiet_trainer(tmp_path, [federated()], logger=logger if party else Rounds())
        trainer.fit(module, loader)
        return module.vector()

    end(fit)
    assert [(done["weight"], done["total_weight"]) for done in logger.rounds] == [(10, 16)] * 2


@pytest.mark.parametrize("weighting", ["samples", "uniform", 3.0])
def test_batches_of_unknown_size_are_warned_about_once(tmp_path: Path, weighting: Any) -> None:
    callback = FederatedAveraging(weighting=weighting)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet_trainer(tmp_path, [callback]).fit(OfWords(), [["1", "2"], ["3"]])
    told = [str(one.message) for one in said if "cannot determine the samples" in str(one.message)]
    assert len(told) == (weighting == "samples")
    # Each batch counts as one sample.
    assert [done.weight for done in callback.rounds] == [
        {"samples": 2.0, "uniform": 1.0}.get(weighting, 3.0)
    ] * 2


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_batches_of_several_loaders(tmp_path: Path, mode: Any) -> None:
    """Of a batch with several parts the first one that is there counts."""

    class Combined(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            parts = [part for part in batch.values() if part is not None]
            return sum((super(Combined, self).training_step(part, 0) for part in parts), torch.tensor(0.0))

    callback = FederatedAveraging()
    loaders = {"a": data(6, seed=1), "b": data(7, seed=2, batch_size=3)}
    quiet_trainer(tmp_path, [callback], max_epochs=1).fit(Combined(), CombinedLoader(loaders, mode))
    # a: 4, 2; b: 3, 3, 1. Past its end a counts b's last, or begins anew.
    expected = {"min_size": 6, "max_size": 6 + 1, "max_size_cycle": 6 + 4}
    assert [done.weight for done in callback.rounds] == [expected[mode]]


def test_batches_may_be_dictionaries(tmp_path: Path) -> None:
    class OfDicts(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    logger = Rounds()

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = OfDicts(seed=party)
        samples = [{"x": x, "y": y} for x, y in data(6, seed=party).dataset]
        loader = torch.utils.data.DataLoader(samples, batch_size=4)
        quiet_trainer(tmp_path, [federated()], max_epochs=1, logger=logger if party else Rounds()).fit(
            module, loader
        )
        return module.vector()

    end(fit)
    assert [done["weight"] for done in logger.rounds] == [6]


def test_a_module_built_in_configure_model(tmp_path: Path) -> None:
    class Late(Classifier):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.seed = seed
            del self.head

        def configure_model(self) -> None:
            if not hasattr(self, "head"):
                self.head = linear(16, 3, seed=self.seed)

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Late(seed=party)
        quiet_trainer(tmp_path, [federated()]).fit(module, data(8, seed=party))
        return module.vector()

    end(fit)


def test_five_parties(tmp_path: Path) -> None:
    sizes = (1, 3, 2, 5, 4)
    loaders = [batches([size], seed=party) for party, size in enumerate(sizes)]
    expected = fedavg(
        Classifier(seed=0), [list(own) for own in loaders], rounds=1, steps=1, weights=[list(sizes)]
    )

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Classifier(seed=party)
        quiet_trainer(tmp_path, [federated()], max_epochs=1).fit(module, loaders[party])
        return module.vector()

    torch.testing.assert_close(end(fit, 5).double(), expected, rtol=0, atol=2e-6)


def test_a_callback_that_the_module_brings(tmp_path: Path) -> None:
    def fit(party: int, federated: Any) -> torch.Tensor:
        class Bringing(Classifier):
            def configure_callbacks(self) -> list[Any]:
                return [federated()]

        module = Bringing(seed=party)
        quiet_trainer(tmp_path).fit(module, data(8, seed=party))
        return module.vector()

    end(fit)


def test_a_barebones_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns whoever logs; nothing of ours does, nor writes files."""
    monkeypatch.chdir(tmp_path)

    class Silent(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def fit(party: int, federated: Any) -> torch.Tensor:
        module = Silent(seed=party)
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=2, barebones=True, callbacks=[federated(every_n_steps=3)]
        )
        trainer.fit(module, data(16, seed=party))
        return module.vector()

    end(fit)
    assert not list(tmp_path.iterdir())
