"""Differential privacy of a single record: DP-SGD inside a party, with per-sample gradients from Opacus."""

import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from pellm_lightning.callbacks.dp_sgd.poisson_sampling import PoissonAccountant, PoissonBatches, poisson
from pellm_lightning.privacy.accountant import Accountant, check_accountant, check_delta, root_logger_kept
from pellm_lightning.privacy.clipping import check_max_norm, clip_factors
from pellm_lightning.privacy.noise import Noise
from pellm_lightning.trainer.pickling import own_state

log = logging.getLogger(__name__)

_PRECISIONS = ("32-true", "bf16-mixed")
_PROBED_RECORDS = 16
_PLANNED_STEPS = 100_000


class DPSGD(Callback):
    """Trains one party by DP-SGD, so that what leaves it hides any single record of its training data.

    Before each optimizer step the gradient of every record in the batch is clipped to the 2-norm C =
    ``max_grad_norm``, Gaussian noise of standard deviation z C is added to their sum, z =
    ``noise_multiplier``, and the sum is divided by the expected batch size (Abadi et al. 2016,
    arXiv:1607.00133): test_equals_opacus. Batches are Poisson samples: each record is in a batch with
    probability batch size / number of records. The module's own optimizer and schedule go on from there.

    Neighbouring: one record of the training DataLoader's dataset more or less; their number is taken as
    public. Protected are the parameters after every step, so all rounds, the adapter and whatever is computed
    from them, against anyone who sees them. Not protected are numbers that come from the data otherwise.
    ``FederatedAveraging`` keeps the training loss at home then, and refuses ``weighting="samples"``, which
    tells how many a party has drawn; validation metrics it averages. Assumed is that a person has one record,
    and that noise and samples stay unknown; both come from the operating system's generator, not from a seed.

    Noise on both factors of a LoRA pair is multiplied in their product, so combine it with a rule that trains
    one at a time: ``FrozenA`` or ``Alternating``. Any rule of aggregation keeps the guarantee, since it only
    sees what is noisy already.

    What it cannot make right is refused: more than one process, more than one batch per step, manual
    optimization, ``16-mixed``, batch norm, layers without per-sample gradients, and a training loss that is
    not the mean over records of a loss of each alone. The last is tried out at the start, on a few records:
    ``training_step`` runs, without gradients and without logging.

    Args:
        noise_multiplier: Noise over clipping norm, z. 0 clips only, without any guarantee.
        max_grad_norm: Clipping norm C of one record's gradient.
        delta: Probability that the bound epsilon may fail; well below one over the number of records.
        max_epsilon: Training ends before a step would exceed this. Default: no limit, it is logged only.
        accountant: "rdp", or "pld", which takes seconds an epoch and allows for more steps.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        noise_multiplier: float,
        max_grad_norm: float,
        delta: float = 1e-5,
        max_epsilon: float | None = None,
        accountant: Accountant = "rdp",
    ) -> None:
        if not 0 <= noise_multiplier <= 1e6:
            raise ValueError(f"noise_multiplier={noise_multiplier} must be from 0 to 1e6; 1 is usual.")
        check_max_norm(max_grad_norm, "max_grad_norm")
        check_delta(delta)
        check_accountant(accountant)
        if max_epsilon is not None and not (math.isfinite(max_epsilon) and max_epsilon > 0):
            raise ValueError(f"max_epsilon={max_epsilon} must be a finite number above 0, or None.")
        if max_epsilon is not None and noise_multiplier == 0:
            raise ValueError(f"max_epsilon={max_epsilon} cannot be kept with noise_multiplier=0.")
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = max_grad_norm
        self.delta = delta
        self.max_epsilon = max_epsilon
        self.accountant = accountant
        self._accountant = PoissonAccountant()
        self._noise = Noise()
        # What a fit builds; all of it is dropped when the fit ends.
        self._source: _PoissonSource | None = None
        self._hooks: Any = None
        self._size = 0
        self._rate = 0.0
        self._steps_left: float = 0
        self._is_verified = False

    # ---- hooks, in the order in which they run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; from now on the training DataLoader hands out Poisson batches."""
        if stage != "fit":
            return
        self._let_go(trainer)
        _check_trainer(trainer, pl_module)
        self._source = _PoissonSource(trainer.fit_loop._data_source)
        trainer.fit_loop._data_source = self._source  # type: ignore[assignment]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the gradient of each record, and find out how many steps the budget allows."""
        _check_batch_norm(pl_module)
        _check_loss(trainer, pl_module, self._loader)
        self._hooks = _grad_sample_hooks(pl_module)
        self._is_verified = False
        self._plan(trainer)
        if self._steps_left == 0:
            raise MisconfigurationException(
                f"The records' privacy budget max_epsilon={self.max_epsilon} is spent after"
                f" {self._accountant.steps} steps; the next would exceed it. Raise it or the noise_multiplier, or"
                " stop here."
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note how many records the batch really holds: an empty one has a stand-in."""
        self._size = self._batches.sizes.popleft()
        if self._batches.rate != self._rate:  # another DataLoader, of other records
            self._plan(trainer)

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Replace the gradient by the noisy mean of the records' clipped gradients."""
        if self._steps_left <= 0:
            raise MisconfigurationException(
                f"The records' privacy budget max_epsilon={self.max_epsilon} is spent, but min_epochs or"
                " min_steps keeps training on. Lower them."
            )
        trained = self._trained(pl_module, optimizer)
        samples = {name: _take(parameter) for name, parameter in trained.items()}
        self._check(trained, samples)
        self._steps_left -= 1
        self._accountant.step(self.noise_multiplier, self._batches.rate)
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in
                             samples.values()]).norm(dim=0)  # fmt: skip
        factors = clip_factors(norms, self.max_grad_norm).float() * (self._size > 0)
        for name, parameter in trained.items():
            # Not a product where the factor is 0: 0 * nan is nan.
            kept = samples[name][factors > 0]
            noisy = torch.einsum("i,i...->...", factors[factors > 0], kept).flatten()
            self._noise.add_(noisy, self.noise_multiplier * self.max_grad_norm)
            parameter.grad = (noisy / self._expected_size).view_as(parameter).to(parameter.dtype)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop when the budget allows for no further step."""
        if self._steps_left <= 0:
            self._plan(trainer)
        if self._steps_left <= 0 and not trainer.should_stop:
            log.info("The records' privacy budget max_epsilon=%s is spent: training ends.", self.max_epsilon)
            trainer.should_stop = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the steps have cost so far."""
        pl_module.log("privacy/epsilon_records", self.epsilon)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._let_go(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._let_go(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the module and the DataLoader of a fit out of a pickled callback or a copy."""
        return own_state(self, _hooks=None, _source=None)

    # ---- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the steps whose cost a resumed run goes on from."""
        return self._accountant.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was spent."""
        self._accountant.load_state_dict(state_dict)

    @property
    def epsilon(self) -> float:
        """Epsilon of all steps so far, at ``delta``."""
        return self._accountant.epsilon(self.delta, self.accountant)

    # ---- the parts of the hooks

    def _plan(self, trainer: Trainer) -> None:
        """Find out how many of the next steps the budget allows."""
        self._rate = self._batches.rate
        if self.max_epsilon is None:
            self._steps_left = math.inf
            return
        planned = trainer.estimated_stepping_batches
        at_most = int(planned) if 0 < planned < _PLANNED_STEPS else _PLANNED_STEPS
        self._steps_left = self._accountant.affordable(
            self.noise_multiplier, self._rate, at_most, self.max_epsilon, self.delta, self.accountant
        )

    def _trained(self, module: LightningModule, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """Return the parameters that this step moves; those that rest have lost their gradient."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        trained = {}
        for name, parameter in module.named_parameters():
            if id(parameter) not in mine:
                continue
            sampled = getattr(parameter, "grad_sample", None)
            if parameter.grad is None and sampled is not None:
                parameter.grad_sample = None  # type: ignore[attr-defined]
                continue
            if sampled is None or isinstance(sampled, list):
                raise MisconfigurationException(
                    f"The parameter {name!r} has no gradient of its own for each record: "
                    + (
                        "the loss does not depend on it. Freeze it."
                        if parameter.grad is None
                        else "several batches were accumulated. Take one batch per step."
                        if isinstance(sampled, list)
                        else "Opacus knows no rule for its layer. Train another, or with LoRA."
                    )
                )
            trained[name] = parameter
        return trained

    def _check(self, trained: Mapping[str, nn.Parameter], samples: Mapping[str, Tensor]) -> None:
        """Check once that the records' gradients add up to the batch's, always that none is missing."""
        for name, parameter in trained.items():
            here, expected = samples[name], parameter.grad
            if len(here) != max(self._size, 1):
                raise MisconfigurationException(
                    f"A batch of {max(self._size, 1)} records has {len(here)} gradients of {name!r}: the"
                    " first dimension of its layer's input is not the record. Train another layer."
                )
            if self._is_verified or expected is None or not expected.isfinite().all():
                continue
            mean = here.mean(0).view_as(expected)
            if float((mean - expected).norm()) > 0.02 * float(expected.norm()) + 1e-6:
                raise MisconfigurationException(
                    f"The records' gradients of {name!r} do not add up to the batch's: it is used in a way"
                    " that Opacus does not see, as tied weights or a term of the loss of its own. Train"
                    " another layer."
                )
        self._is_verified = True

    @property
    def _loader(self) -> DataLoader[Any]:
        if self._source is None or self._source.loader is None:
            raise RuntimeError("The training DataLoader is known only during a fit.")
        return self._source.loader

    @property
    def _batches(self) -> PoissonBatches:
        batches = self._loader.batch_sampler
        if not isinstance(batches, PoissonBatches):
            raise MisconfigurationException("The training DataLoader no longer hands out Poisson batches.")
        return batches

    @property
    def _expected_size(self) -> float:
        return self._batches.rate * self._batches.records

    def _let_go(self, trainer: Trainer) -> None:
        if self._hooks is not None:
            self._hooks.cleanup()
        if self._source is not None:
            trainer.fit_loop._data_source = self._source.original
        self._hooks = self._source = None


class _PoissonSource:
    """Where the Trainer gets its training DataLoader from, as often as it asks."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.loader: DataLoader[Any] | None = None

    def dataloader(self) -> DataLoader[Any]:
        loader = self.original.dataloader()
        try:
            self.loader = poisson(loader)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        return self.loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def _check_trainer(trainer: Trainer, module: LightningModule) -> None:
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "DPSGD acts before each optimizer step, which manual optimization makes by itself. Set"
            " automatic_optimization=True."
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise MisconfigurationException(
            f"DPSGD works in a party of one process, not with {type(trainer.strategy).__name__}: each"
            " would sample and add noise for itself. Use devices=1."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} would step on several samples."
            " Raise the batch size instead; it is the expected number of records of a step."
        )
    if trainer.precision not in _PRECISIONS:
        raise MisconfigurationException(
            f"DPSGD works with precision {' or '.join(_PRECISIONS)}, not {trainer.precision!r}: scaled"
            " or coarse gradients are not clipped to the norm."
        )
    if getattr(trainer, "overfit_batches", 0):
        raise MisconfigurationException(
            "overfit_batches repeats its batches; a Poisson sample is new each time."
        )


def _check_batch_norm(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise MisconfigurationException(
                f"{name!r} is a {type(part).__name__}, which mixes the records of a batch and keeps their"
                " statistics. Replace it, for example by GroupNorm."
            )


def _grad_sample_hooks(module: LightningModule) -> Any:
    try:
        with root_logger_kept():
            from opacus.grad_sample import GradSampleHooks
            from opacus.validators import ModuleValidator
    except ImportError as error:
        raise ImportError(
            'DPSGD needs the package opacus: pip install "pellm-lightning[privacy]".'
        ) from error
    for name, part in module.named_modules():
        if not part.training and any(p.requires_grad for p in part.parameters(recurse=False)):
            raise MisconfigurationException(
                f"{name!r} is trained but in eval mode, where Opacus does not watch it. Call its train()."
            )
    try:
        ModuleValidator.validate(module, strict=True)
        return GradSampleHooks(module)
    except (ValueError, NotImplementedError) as error:
        raise MisconfigurationException(
            f"Opacus cannot tell this module's gradients apart by record: {error}"
        ) from error


@torch.no_grad()
def _check_loss(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> None:
    """Check on a few records that the loss of a batch is the mean of the losses of its records.

    A mean over the tokens of a batch is not: one record more would change the weight of every other, and so
    more than its own clipped gradient.
    """
    dataset: Any = loader.dataset
    count = min(len(dataset), _PROBED_RECORDS)
    records = [dataset[index * len(dataset) // count] for index in range(count)]

    def loss_of(chosen: list[Any]) -> float:
        batch = trainer.strategy.batch_to_device(loader.collate_fn(chosen), module.device)
        step = module.training_step
        takes_index = len(inspect.signature(step).parameters) > 1
        output = step(batch, 0) if takes_index else step(batch)
        loss: Any = output["loss"] if isinstance(output, Mapping) else output
        return float(loss)

    with _as_if_not_training(module):
        together = loss_of(records)
        alone = math.fsum(loss_of([record]) for record in records) / count
    if math.isfinite(together) and abs(together - alone) > 1e-4 * max(abs(alone), 1e-3):
        raise MisconfigurationException(
            f"The training loss of {count} records together is {together:.6g}, the mean of each one's own"
            f" {alone:.6g}: it is not the mean over records of a loss of each alone, so one record would"
            " reach the gradients of others past the clipping. Return such a mean from training_step: for a"
            " language model, over the tokens of each record first, then over records; with records of equal"
            " length it is one already."
        )


@contextmanager
def _as_if_not_training(module: LightningModule) -> Iterator[None]:
    """No dropout, no logging, no draw from the global generators."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    for name in ("log", "log_dict"):
        setattr(module, name, lambda *_, **__: None)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        del module.log, module.log_dict
        for part, training in modes.items():
            part.training = training


def _take(parameter: nn.Parameter) -> Tensor:
    """Return the records' gradients as float32, (B, ...), and forget them."""
    taken: Tensor = parameter.grad_sample.float()  # type: ignore[attr-defined]
    parameter.grad_sample = None  # type: ignore[attr-defined]
    return taken
