"""DP-SGD inside a party: against Opacus on the same gradients, inside a federation, and what it refuses."""

import math
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from party_threads import (
    Classifier,
    Rounds,
    ValidatedClassifier,
    data,
    dataset,
    fit_parties,
    linear,
    quiet_trainer,
    refusals,
)
from scipy import stats
from torch import nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pellm_lightning.aggregation import Alternating, FrozenA
from pellm_lightning.callbacks.dp_sgd import DPSGD, dp_sgd
from pellm_lightning.callbacks.dp_sgd.poisson_sampling import PoissonAccountant, PoissonBatches, poisson

pytestmark = [
    # Layers whose inputs need no gradient: frozen ones stand before them.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    # Which is what a test is about.
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode:UserWarning"),
]


class Recorder(Callback):
    """Keeps what reached the optimizer, batch by batch."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.before: list[torch.Tensor] = []
        self.grads: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append([part.clone() for part in batch])
        self.before.append(module.vector())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        grads = [p.grad for p in module.head.parameters()]
        self.grads.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))


def fit(
    root: Path,
    private: DPSGD,
    module: LightningModule | None = None,
    loader: Any = None,
    *callbacks: Any,
    ckpt_path: Any = None,
    **kwargs: Any,
) -> Any:
    trainer = quiet_trainer(root, [private, *callbacks], **kwargs)
    module = module or Classifier()
    trainer.fit(module, loader or data(24, seed=0), ckpt_path=ckpt_path)
    return trainer


# ---- the step


def test_equals_opacus(tmp_path: Path) -> None:
    # Without noise: the same batches through Opacus' own optimizer give the same gradients.
    recorder = Recorder()
    fit(tmp_path, DPSGD(0.0, 0.5), None, data(24, seed=0, batch_size=12), recorder, max_epochs=4)
    assert len(recorder.grads) == 8
    sizes = {len(batch[0]) for batch in recorder.batches}
    assert len(sizes) > 1, "Poisson batches have no fixed size"
    for batch, before, grad in zip(recorder.batches, recorder.before, recorder.grads, strict=True):
        oracle = Classifier()
        nn.utils.vector_to_parameters(before, oracle.head.parameters())
        hooks = GradSampleHooks(oracle)
        optimizer = DPOptimizer(
            torch.optim.SGD(oracle.head.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            expected_batch_size=12,
        )
        nn.functional.cross_entropy(oracle(batch[0]), batch[1]).backward()
        optimizer.pre_step()
        expected = torch.cat([p.grad.flatten() for p in oracle.head.parameters()])
        hooks.cleanup()
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7)


def test_one_record_moves_the_gradient_by_no_more_than_the_norm(tmp_path: Path) -> None:
    # Inputs of norm 1e4 and one that is not finite: each record adds at most C / (expected batch size).
    x, y = dataset(8, seed=0).tensors
    x = x * 1e4
    x[3] = math.inf
    recorder = Recorder()
    loader = DataLoader(TensorDataset(x, y), batch_size=8)  # probability 1: every record each time
    module = Embedded()
    fit(tmp_path, DPSGD(0.0, 0.25), module, loader, recorder, max_epochs=1)
    (grad,) = recorder.grads
    assert grad.isfinite().all()
    assert 0 < float(grad.norm()) <= 7 * 0.25 / 8  # seven records are finite


class Embedded(Classifier):
    """A Classifier without the tanh, which would tame its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(x))


def test_noise_has_the_standard_deviation_it_should(tmp_path: Path) -> None:
    # No learning; what varies beside the noise is bounded by C = 1e-6.
    recorder = Recorder()
    wide = Classifier(lr=0.0)
    wide.head = linear(16, 512, seed=0)
    private = DPSGD(1e6, 1e-6)
    fit(tmp_path, private, wide, data(40, seed=0, batch_size=8), recorder, max_epochs=2)
    draws = torch.stack(recorder.grads).double().flatten() * 8  # times the expected batch size
    assert draws.numel() == 10 * (16 * 512 + 512)
    low, high = (stats.chi2.ppf(p, draws.numel()) / draws.numel() for p in (5e-10, 1 - 5e-10))
    assert low < float(draws.square().mean()) < high
    a, b = recorder.grads[:2]
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 6.2 / math.sqrt(len(a))


def test_an_empty_draw_is_noise_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    # A probability so small that nothing is drawn, at most once in 10^5 runs.
    private = DPSGD(0.0, 1.0)
    monkeypatch.setattr(PoissonBatches, "__init__", _rarely)
    fit(tmp_path, private, None, data(8, seed=0, batch_size=4), recorder)
    assert [len(batch[0]) for batch in recorder.batches] == [1] * 4, "a stand-in"
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in recorder.grads)
    assert private._accountant.steps == 4


def _rarely(self: PoissonBatches, records: int, rate: float, batches: int) -> None:
    self.records, self.rate, self.batches, self.sizes = records, 1e-7, batches, deque()


def test_learns(tmp_path: Path) -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    module = Classifier(lr=1.0)
    fit(tmp_path, DPSGD(0.5, 1.0), module, DataLoader(TensorDataset(x, y), batch_size=40), max_epochs=8)
    with torch.no_grad():
        assert float((module(x).argmax(1) == y).float().mean()) > 0.8


def test_works_with_adam_a_schedule_and_workers(tmp_path: Path) -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.head.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    loader = DataLoader(dataset(24, seed=0), batch_size=6, num_workers=1, persistent_workers=True)
    recorder = Recorder()
    trainer = fit(tmp_path, DPSGD(1.0, 1.0), Scheduled(), loader, recorder)
    assert len(recorder.grads) == trainer.global_step == 8
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**8)
    assert type(trainer.optimizers[0]) is torch.optim.AdamW


def test_works_with_bf16_mixed(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(tmp_path, DPSGD(0.0, 1e-3), None, None, recorder, precision="bf16-mixed")
    assert all(float(grad.norm()) <= 24 * 1e-3 / 4 for grad in recorder.grads)
    assert any(float(grad.norm()) > 0 for grad in recorder.grads), "but for empty draws"


# ---- sampling


def test_each_record_is_drawn_with_its_probability() -> None:
    batches = PoissonBatches(50, 0.2, 2000)
    drawn = torch.zeros(2000, 50)
    for row, indices in enumerate(batches):
        size = batches.sizes.popleft()
        drawn[row, indices[:size]] = 1
        assert size in (len(indices), 0)
    # Each record's count is binomial; records and successive batches are independent.
    low, high = stats.binom.ppf([1e-9, 1 - 1e-9], 2000, 0.2)
    assert ((low <= drawn.sum(0)) & (drawn.sum(0) <= high)).all()
    sizes = drawn.sum(1)
    assert float(sizes.var()) == pytest.approx(50 * 0.2 * 0.8, rel=0.25)
    correlation = torch.corrcoef(torch.stack([sizes[1:], sizes[:-1]]))[0, 1]
    assert abs(float(correlation)) < 6.2 / math.sqrt(2000)


def test_a_seed_does_not_choose_the_sample() -> None:
    drawn = []
    for _ in range(2):
        seed_everything(1, verbose=False)
        drawn.append(list(PoissonBatches(64, 0.5, 4)))
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        del os.environ[name]
    assert drawn[0] != drawn[1]


def test_batches_are_as_large_and_as_many_as_before() -> None:
    loader = poisson(data(25, seed=0, batch_size=6))
    assert len(loader) == 5
    assert isinstance(loader.batch_sampler, PoissonBatches)
    assert loader.batch_sampler.rate == 6 / 25
    assert poisson(data(3, seed=0, batch_size=6)).batch_sampler.rate == 1.0


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(dataset(8, seed=0))


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (lambda: [data(4, 0), data(4, 1)], "not from list"),
        (lambda: DataLoader(Stream(), batch_size=4), "IterableDataset cannot be sampled"),
        (lambda: DataLoader(dataset(8, 0), batch_size=None), "select records themselves"),
        (lambda: DataLoader(dataset(8, 0), batch_sampler=[[0, 1], [2]]), "select records themselves"),
        (lambda: DataLoader(dataset(8, 0), 4, sampler=SubsetRandomSampler([1, 2])), "SubsetRandomSampler"),
        (lambda: DataLoader(dataset(8, 0), 4, sampler=WeightedRandomSampler([1.0] * 8, 8)), "WeightedRandom"),
        (
            lambda: DataLoader(dataset(8, 0), 4, sampler=RandomSampler(range(8), replacement=True)),
            "RandomSampler",
        ),
        (lambda: DataLoader(TensorDataset(torch.zeros(0, 8)), 4), "training dataset is empty"),
    ],
)
def test_refuses_loaders_that_do_not_hand_out_every_record_once(
    loader: Callable[[], Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        poisson(loader())


# ---- accounting


def test_hundred_steps_at_one() -> None:
    from opacus.accountants import RDPAccountant

    accountant, opacus = PoissonAccountant(), RDPAccountant()
    for _ in range(100):
        accountant.step(1.0, 0.1)
        opacus.step(noise_multiplier=1.0, sample_rate=0.1)
    assert accountant.epsilon(1e-5) == pytest.approx(7.904, abs=5e-4)
    assert accountant.epsilon(1e-5, "pld") == pytest.approx(7.047, abs=5e-4)
    # Opacus sums the same Rényi divergences over slightly different orders.
    assert opacus.get_epsilon(1e-5) == pytest.approx(7.899, abs=5e-4)
    assert accountant.epsilon(1e-5) == pytest.approx(opacus.get_epsilon(1e-5), rel=1e-3)


def test_affordable_steps_are_the_most_within_the_budget() -> None:
    accountant = PoissonAccountant()
    accountant.step(1.0, 0.1, 40)
    more = accountant.steps_within_budget(1.0, 0.1, 10_000, 7.904, 1e-5)
    assert more == 60
    accountant.step(1.0, 0.1, more)
    assert accountant.epsilon(1e-5) <= 7.904
    accountant.step(1.0, 0.1)
    assert accountant.epsilon(1e-5) > 7.904
    assert accountant.steps_within_budget(1.0, 0.1, 10_000, 7.904, 1e-5) == 0
    assert PoissonAccountant().steps_within_budget(1.0, 0.1, 50, 7.904, 1e-5) == 50


def test_accounting_and_opacus_leave_the_logs_alone() -> None:
    # In a process of its own: pytest has handlers at the root logger, and Opacus is imported here.
    source = """
import logging
from pellm_lightning.callbacks.dp_sgd.poisson_sampling import PoissonAccountant
from pellm_lightning.callbacks.dp_sgd.dp_sgd import _grad_sample_hooks
from torch import nn
accountant = PoissonAccountant()
accountant.step(1.0, 0.225)
assert accountant.epsilon(1e-5) > 0
_grad_sample_hooks(nn.Linear(2, 2))
assert not logging.root.handlers, logging.root.handlers
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_steps_without_noise_cost_everything() -> None:
    accountant = PoissonAccountant()
    assert accountant.epsilon(1e-5) == 0
    accountant.step(0.0, 0.1)
    assert accountant.epsilon(1e-5) == math.inf


def test_epsilon_is_logged_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    first, both, mixed = PoissonAccountant(), PoissonAccountant(), PoissonAccountant()
    first.step(1.0, 4 / 24, 6)  # 24 records in batches of 4
    both.step(1.0, 4 / 24, 12)
    mixed.step(1.0, 4 / 24, 6)
    mixed.step(2.0, 4 / 24, 6)

    logger, resumed = Rounds(), DPSGD(2.0, 1.0)
    fit(tmp_path, DPSGD(1.0, 1.0), logger=logger, log_every_n_steps=1)
    assert logger.metrics["privacy/epsilon_records"] == pytest.approx(
        [first.epsilon(1e-5), both.epsilon(1e-5)]
    )
    fit(tmp_path, DPSGD(1.0, 1.0), max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    fit(tmp_path, resumed, ckpt_path=tmp_path / "first.ckpt")
    assert resumed.state_dict() == mixed.state_dict()
    assert resumed.epsilon == mixed.epsilon(1e-5)


def test_stops_before_the_budget_is_exceeded(tmp_path: Path) -> None:
    limit = PoissonAccountant()
    limit.step(1.0, 4 / 24, 9)
    private = DPSGD(1.0, 1.0, max_epsilon=limit.epsilon(1e-5) + 1e-9)
    trainer = fit(tmp_path, private)
    assert trainer.global_step == private._accountant.steps == 9
    assert private.epsilon <= private.max_epsilon
    with pytest.raises(MisconfigurationException, match="is spent after 9 steps"):
        fit(tmp_path, private)


def test_a_budget_for_more_than_was_planned_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "_PLANNED_STEPS", 4)
    assert fit(tmp_path, DPSGD(1.0, 1.0, max_epsilon=100.0)).global_step == 12


def test_a_loader_of_fewer_records_spends_more(tmp_path: Path) -> None:
    class Shrinking(Classifier):
        def train_dataloader(self) -> Any:
            return data(24 if self.current_epoch == 0 else 8, seed=0)

    limit = PoissonAccountant()
    limit.step(1.0, 4 / 24, 6)
    limit.step(1.0, 4 / 8, 1)
    private = DPSGD(1.0, 1.0, max_epsilon=limit.epsilon(1e-5) + 1e-9)
    trainer = quiet_trainer(tmp_path, [private], reload_dataloaders_every_n_epochs=1)
    trainer.fit(Shrinking())
    assert private.state_dict() == limit.state_dict()


def test_does_not_step_past_the_budget_for_min_steps(tmp_path: Path) -> None:
    limit = PoissonAccountant()
    limit.step(1.0, 4 / 24, 3)
    private = DPSGD(1.0, 1.0, max_epsilon=limit.epsilon(1e-5) + 1e-9)
    with pytest.raises(MisconfigurationException, match="min_epochs or min_steps keeps training on"):
        fit(tmp_path, private, min_steps=5)
    assert private._accountant.steps == 3


# ---- in a federation


class LoraPair(LightningModule):
    """A frozen layer with a LoRA pair named as PEFT names it, and a head that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = linear(8, 16, seed=1).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 16, bias=False)})
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in (self.lora_A["default"].weight, self.lora_B["default"].weight):
                parameter.normal_(generator=generator)
        self.head = linear(16, 3, seed=3).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        hidden = self.base(x) + self.lora_B["default"](self.lora_A["default"](x))
        return nn.functional.cross_entropy(self.head(torch.tanh(hidden)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)

    def factors(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in (self.lora_A["default"].weight, self.lora_B["default"].weight)]


@pytest.mark.parametrize("rule", [FrozenA, Alternating])
def test_what_rests_gets_neither_step_nor_noise(tmp_path: Path, rule: Any) -> None:
    start = LoraPair().factors()

    def party(index: int, federated: Any) -> tuple[list[torch.Tensor], float]:
        module, private = LoraPair(), DPSGD(1.0, 1.0)
        averaging = federated(aggregation=rule(), weighting="uniform")
        trainer = quiet_trainer(tmp_path / str(index), [averaging, private], max_epochs=1)
        trainer.fit(module, data(16 + 8 * index, seed=index))
        return module.factors(), private.epsilon

    (first, spent), (second, less) = fit_parties(2, party)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))
    assert torch.equal(first[0], start[0]), "A rests in round 0"
    assert not torch.equal(first[1], start[1])
    assert spent != less, "each party has a ledger of its own"


def test_nothing_else_of_the_records_leaves_a_party(tmp_path: Path) -> None:
    def party(index: int, federated: Any, weighting: Any = "uniform") -> list[dict[str, float]]:
        logger = Rounds()
        callbacks = [federated(weighting=weighting), DPSGD(1.0, 1.0)]
        trainer = quiet_trainer(tmp_path / str(index), callbacks, logger=logger, max_epochs=1)
        trainer.fit(Classifier(seed=index), data(16, seed=index))
        return logger.rounds

    for rounds in fit_parties(2, party):
        assert len(rounds) == 1
        assert "loss" not in rounds[0]
        assert rounds[0]["total_weight"] == 2
    by_samples = fit_parties(2, lambda *known: party(*known, weighting="samples"), may_fail=True)
    assert all("weighting='uniform'" in told for told in refusals(by_samples, MisconfigurationException))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")
def test_peft_classifier_trains_privately(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    from peft import LoraConfig
    from transformers import BertConfig, BertModel

    from pellm_lightning.tasks import TextClassification

    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=40, **size)).save_pretrained(tmp_path / "bert")
    rows = [
        {"input_ids": torch.tensor([2, 3 + i % 30, 5]), "attention_mask": torch.ones(3, dtype=torch.long),
         "labels": torch.tensor(i % 2)} for i in range(24)
    ]  # fmt: skip
    module = TextClassification(
        str(tmp_path / "bert"), 2, peft=LoraConfig(r=2, target_modules=["query", "value"])
    )
    private = DPSGD(1.0, 0.5)
    fit(tmp_path, private, module, DataLoader(rows, batch_size=6))  # type: ignore[arg-type]
    assert private._accountant.steps == 8
    assert not any(hasattr(p, "grad_sample") for p in module.parameters())


# ---- what it refuses


def refused(tmp_path: Path, words: str, module: LightningModule | None = None, **kwargs: Any) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        fit(tmp_path, DPSGD(1.0, 1.0), module, kwargs.pop("loader", None), **kwargs)


class TokenMean(Classifier):
    """Weights a record by its number of tokens, as language models do: here by its label."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        losses = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
        tokens = batch[1] + 1.0
        return (losses * tokens).sum() / tokens.sum()


class SumOfLosses(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize("module", [TokenMean, SumOfLosses])
def test_refuses_a_loss_that_mixes_records(tmp_path: Path, module: type[LightningModule]) -> None:
    refused(tmp_path, "not the mean over records of each one's own loss", module())


def test_probing_the_loss_logs_nothing_and_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dropping(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    def probe(trainer: Any, module: LightningModule, loader: Any) -> None:
        state, modes = torch.get_rng_state(), [part.training for part in module.modules()]
        check(trainer, module, loader)
        assert torch.equal(torch.get_rng_state(), state)
        assert [part.training for part in module.modules()] == modes
        probed.append(module)

    check, probed = dp_sgd._check_loss, list[LightningModule]()
    monkeypatch.setattr(dp_sgd, "_check_loss", probe)
    logger = Rounds()
    fit(tmp_path, DPSGD(1.0, 1.0), Dropping(), logger=logger, max_epochs=1, log_every_n_steps=1)
    assert probed
    assert len(logger.metrics["train_loss"]) == 6, "one for each step"


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Normed(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.base(x)))


class Tied(Classifier):
    """Uses its head once as a layer, and once behind Opacus' back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.base(x))
        return self.head(hidden) + 3 * nn.functional.linear(hidden, self.head.weight)


class Bare(Classifier):
    """Trains a parameter that no layer of torch's holds."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterDict({"default": nn.Parameter(torch.ones(16))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.base(x)) * self.scales["default"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Unused(Bare):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Classifier.forward(self, x)


class Evaluating(Classifier):
    def on_train_start(self) -> None:
        self.head.eval()

    def on_fit_start(self) -> None:
        self.head.eval()


class Recurrent(Classifier):
    """Trains a layer that Opacus refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16)


class Flattened(Classifier):
    """Its head sees two rows for each record."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.base(x))
        return self.head(torch.cat([hidden, 2 * hidden])).view(2, -1, 3).sum(0)


@pytest.mark.parametrize(
    ("module", "settings", "words"),
    [
        (Manual, {}, "manual optimization"),
        (Classifier, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        (Classifier, {"precision": "16-true"}, "not '16-true'"),
        (Classifier, {"precision": "64-true"}, "not '64-true'"),
        (Classifier, {"overfit_batches": 1}, "overfit_batches"),
        (
            Classifier,
            {"loader": DataLoader(dataset(8, 0), 4, sampler=SubsetRandomSampler([1]))},
            "select records themselves",
        ),
        (Normed, {}, "'norm' is a BatchNorm1d"),
        (Tied, {}, "do not sum to"),
        (Bare, {}, "has no per-sample gradients"),
        (Unused, {}, "the loss does not depend on it"),
        (Evaluating, {}, "'head' is trained but in eval mode"),
        (Recurrent, {}, "Opacus does not support this module"),
        (Flattened, {}, "first dimension of its layer's input is not the record"),
    ],
)
def test_refuses(tmp_path: Path, module: Any, settings: dict[str, Any], words: str) -> None:
    refused(tmp_path, words, module(), **settings)


def test_refuses_a_party_of_several_processes(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, strategy="ddp")
    with pytest.raises(MisconfigurationException, match="not with DDPStrategy"):
        DPSGD(1.0, 1.0).setup(trainer, Classifier(), "fit")


def test_refuses_a_schedule_of_accumulation(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="accumulat"):
        fit(tmp_path, DPSGD(1.0, 1.0), None, None, GradientAccumulationScheduler({1: 2}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise_multiplier": -1.0}, r"noise_multiplier=-1\.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0\.0 must be between"),
        ({"delta": 0.0}, r"delta=0\.0"),
        ({"max_epsilon": 0.0}, r"max_epsilon=0\.0"),
        ({"max_epsilon": 1.0, "noise_multiplier": 0.0}, "cannot be kept"),
        ({"accountant": "gdp"}, "accountant='gdp'"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DPSGD(**{"noise_multiplier": 1.0, "max_grad_norm": 1.0} | settings)


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(ImportError, match=r"pip install \"pellm-lightning\[privacy\]\""):
        fit(tmp_path, DPSGD(1.0, 1.0))


def test_evaluation_is_left_alone(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, [DPSGD(1.0, 1.0)]).validate(ValidatedClassifier(), data(4, seed=0), verbose=False)


def test_leaves_module_and_trainer_as_they_were(tmp_path: Path) -> None:
    module, loader = Classifier(), data(24, seed=0)
    trainer = fit(tmp_path, DPSGD(1.0, 1.0), module, loader)
    assert trainer.fit_loop._data_source.instance is loader
    assert not hasattr(module, "autograd_grad_sample_hooks")
    assert not any(hasattr(p, "grad_sample") for p in module.parameters())
    fit(tmp_path, DPSGD(1.0, 1.0), module, loader)
