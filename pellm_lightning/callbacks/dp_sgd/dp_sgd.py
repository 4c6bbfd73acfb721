"""DP-SGD of a party: record-level differential privacy, with per-sample gradients from Opacus."""

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
    """DP-SGD callback, which protects every single record of a party's training data.

    Before each optimizer step the gradient of every record in the batch is clipped to the 2-norm C =
    ``max_grad_norm``, Gaussian noise of standard deviation z C is added to their sum, z =
    ``noise_multiplier``, and the sum is divided by the expected batch size (Abadi et al. 2016,
    arXiv:1607.00133): test_equals_opacus. Batches are Poisson samples: each record is in a batch with
    probability batch size / number of records. The module's optimizer and schedule stay as they are.

    Neighbouring relation: add or remove one record of the training dataset, whose size is public. Protected
    are the parameters after every step, hence all rounds, the adapter and everything computed from them,
    against anyone who sees them. Not protected are other numbers computed from the data:
    ``FederatedAveraging`` does not send the training loss, and refuses ``weighting="samples"``, which reveals
    the sampled batch sizes; it does average validation metrics. Assumptions: a person has one record, and
    noise and samples stay secret; both come from the operating system's generator, not from a seed.

    Noise on both factors of a LoRA pair is multiplied in their product, so combine it with a rule that trains
    one at a time: ``FrozenA`` or ``Alternating``. Every aggregation rule keeps the guarantee
    (post-processing).

    Unsupported, and refused: several processes, several batches per step, manual optimization, ``16-mixed``,
    batch norm, layers without per-sample gradients, and a training loss that is not the mean over records of
    each one's own loss. The last is checked at the start by ``training_step`` on a few records, without
    gradients and logging.

    Args:
        noise_multiplier: Noise over clipping norm, z. 0 clips only, without any guarantee.
        max_grad_norm: Clipping norm C of one record's gradient.
        delta: Probability that the bound epsilon may fail; well below one over the number of records.
        max_epsilon: Training stops before a step would exceed this. Default: no limit, it is only logged.
        accountant: "rdp", or "pld", which takes seconds per epoch and allows more steps.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> from pellm_lightning.aggregation import FrozenA
        >>> dp_sgd = DPSGD(noise_multiplier=1.0, max_grad_norm=1.0, max_epsilon=8.0)
        >>> callbacks = [FederatedAveraging(weighting="uniform", aggregation=FrozenA()), dp_sgd]
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
        # State of a fit, dropped at its end.
        self._source: _PoissonSource | None = None
        self._hooks: Any = None
        self._size = 0
        self._rate = 0.0
        self._steps_left: float = 0
        self._is_verified = False

    # ---- hooks, in the order in which they run

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Validate the Trainer; make the training DataLoader sample Poisson batches."""
        if stage != "fit":
            return
        self._detach(trainer)
        _check_trainer(trainer, pl_module)
        self._source = _PoissonSource(trainer.fit_loop._data_source)
        trainer.fit_loop._data_source = self._source  # type: ignore[assignment]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the per-sample gradient hooks, and compute how many steps the budget allows."""
        _check_batch_norm(pl_module)
        _check_loss(trainer, pl_module, self._loader)
        self._hooks = _grad_sample_hooks(pl_module)
        self._is_verified = False
        self._plan(trainer)
        if self._steps_left == 0:
            raise MisconfigurationException(
                f"The records' privacy budget max_epsilon={self.max_epsilon} is spent after"
                f" {self._accountant.steps} steps. Raise it or the noise_multiplier, or stop here."
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the true size of the batch: an empty one contains a placeholder."""
        self._size = self._batches.sizes.popleft()
        if self._batches.rate != self._rate:  # the DataLoader was replaced
            self._plan(trainer)

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Replace the gradient by the noisy mean of the clipped per-sample gradients."""
        if self._steps_left <= 0:
            raise MisconfigurationException(
                f"The records' privacy budget max_epsilon={self.max_epsilon} is spent, but min_epochs or"
                " min_steps keeps training on. Lower them."
            )
        trained = self._trained(pl_module, optimizer)
        samples = {name: _take_grad_sample(parameter) for name, parameter in trained.items()}
        self._check(trained, samples)
        self._steps_left -= 1
        self._accountant.step(self.noise_multiplier, self._batches.rate)
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in
                             samples.values()]).norm(dim=0)  # fmt: skip
        factors = clip_factors(norms, self.max_grad_norm).float() * (self._size > 0)
        for name, parameter in trained.items():
            # Select instead of multiplying by 0: 0 * nan is nan.
            kept = samples[name][factors > 0]
            noisy = torch.einsum("i,i...->...", factors[factors > 0], kept).flatten()
            self._noise.add_(noisy, self.noise_multiplier * self.max_grad_norm)
            parameter.grad = (noisy / self._expected_size).view_as(parameter).to(parameter.dtype)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop training when the budget allows no further step."""
        if self._steps_left <= 0:
            self._plan(trainer)
        if self._steps_left <= 0 and not trainer.should_stop:
            log.info(
                "The records' privacy budget max_epsilon=%s is spent: stopping training.", self.max_epsilon
            )
            trainer.should_stop = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log epsilon of the steps so far."""
        pl_module.log("privacy/epsilon_records", self.epsilon)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks from the module."""
        self._detach(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks from the module."""
        self._detach(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the callback without module and DataLoader."""
        return own_state(self, _hooks=None, _source=None)

    # ---- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the accountant's state."""
        return self._accountant.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the accountant's state."""
        self._accountant.load_state_dict(state_dict)

    @property
    def epsilon(self) -> float:
        """Epsilon of all steps so far, at ``delta``."""
        return self._accountant.epsilon(self.delta, self.accountant)

    # ---- helpers of the hooks

    def _plan(self, trainer: Trainer) -> None:
        """Compute how many of the next steps the budget allows."""
        self._rate = self._batches.rate
        if self.max_epsilon is None:
            self._steps_left = math.inf
            return
        planned = trainer.estimated_stepping_batches
        at_most = int(planned) if 0 < planned < _PLANNED_STEPS else _PLANNED_STEPS
        self._steps_left = self._accountant.steps_within_budget(
            self.noise_multiplier, self._rate, at_most, self.max_epsilon, self.delta, self.accountant
        )

    def _trained(self, module: LightningModule, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """Return the parameters of this step, without frozen factors, whose gradients were dropped."""
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
                    f"The parameter {name!r} has no per-sample gradients: "
                    + (
                        "the loss does not depend on it. Freeze it."
                        if parameter.grad is None
                        else "several batches were accumulated. Take one batch per step."
                        if isinstance(sampled, list)
                        else "Opacus does not support its layer. Train another, or use LoRA."
                    )
                )
            trained[name] = parameter
        return trained

    def _check(self, trained: Mapping[str, nn.Parameter], samples: Mapping[str, Tensor]) -> None:
        """Check once that the per-sample gradients sum to the batch's, and always that none is missing."""
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
                    f"The per-sample gradients of {name!r} do not sum to the batch's: Opacus does not see"
                    " all of its uses, such as tied weights or an extra term of the loss. Train another"
                    " layer."
                )
        self._is_verified = True

    @property
    def _loader(self) -> DataLoader[Any]:
        if self._source is None or self._source.loader is None:
            raise RuntimeError("The training DataLoader is available only during a fit.")
        return self._source.loader

    @property
    def _batches(self) -> PoissonBatches:
        batches = self._loader.batch_sampler
        if not isinstance(batches, PoissonBatches):
            raise MisconfigurationException("The training DataLoader no longer samples Poisson batches.")
        return batches

    @property
    def _expected_size(self) -> float:
        return self._batches.rate * self._batches.records

    def _detach(self, trainer: Trainer) -> None:
        if self._hooks is not None:
            self._hooks.cleanup()
        if self._source is not None:
            trainer.fit_loop._data_source = self._source.original
        self._hooks = self._source = None


class _PoissonSource:
    """Data source of the fit loop whose training DataLoader samples Poisson batches."""

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
            "DPSGD acts before each optimizer step, which manual optimization bypasses. Set"
            " automatic_optimization=True."
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise MisconfigurationException(
            f"DPSGD works in a party of one process, not with {type(trainer.strategy).__name__}: each"
            " would sample and add noise separately. Use devices=1."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} would step on several samples."
            " Raise the batch size instead; it is the expected number of records of a step."
        )
    if trainer.precision not in _PRECISIONS:
        raise MisconfigurationException(
            f"DPSGD works with precision {' or '.join(_PRECISIONS)}, not {trainer.precision!r}: scaled"
            " or low-precision gradients are not clipped to the norm."
        )
    if getattr(trainer, "overfit_batches", 0):
        raise MisconfigurationException(
            "overfit_batches repeats batches, but Poisson samples must be new in each step."
        )


def _check_batch_norm(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise MisconfigurationException(
                f"{name!r} is a {type(part).__name__}, which mixes the records of a batch and stores their"
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
                f"{name!r} is trained but in eval mode, where Opacus ignores it. Call its train()."
            )
    try:
        ModuleValidator.validate(module, strict=True)
        return GradSampleHooks(module)
    except (ValueError, NotImplementedError) as error:
        raise MisconfigurationException(f"Opacus does not support this module: {error}") from error


@torch.no_grad()
def _check_loss(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> None:
    """Check on a few records that a batch's loss is the mean of its records' losses.

    A mean over the tokens of a batch is not: an added record would change the weight of every other, and so
    more than its own clipped gradient.
    """
    dataset: Any = loader.dataset
    count = min(len(dataset), _PROBED_RECORDS)
    records = [dataset[index * len(dataset) // count] for index in range(count)]

    def loss_of(selected: list[Any]) -> float:
        batch = trainer.strategy.batch_to_device(loader.collate_fn(selected), module.device)
        step = module.training_step
        takes_index = len(inspect.signature(step).parameters) > 1
        output = step(batch, 0) if takes_index else step(batch)
        loss: Any = output["loss"] if isinstance(output, Mapping) else output
        return float(loss)

    with _without_side_effects(module):
        together = loss_of(records)
        alone = math.fsum(loss_of([record]) for record in records) / count
    if math.isfinite(together) and abs(together - alone) > 1e-4 * max(abs(alone), 1e-3):
        raise MisconfigurationException(
            f"The training loss of {count} records together is {together:.6g}, the mean of their own"
            f" {alone:.6g}: it is not the mean over records of each one's own loss, so a record would"
            " change the gradients of others past the clipping. Return such a mean from training_step: for a"
            " language model, average over the tokens of each record first, then over records."
        )


@contextmanager
def _without_side_effects(module: LightningModule) -> Iterator[None]:
    """Disable dropout, logging and changes of the global generators."""
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


def _take_grad_sample(parameter: nn.Parameter) -> Tensor:
    """Take the per-sample gradients as float32, (B, ...), and clear them."""
    taken: Tensor = parameter.grad_sample.float()  # type: ignore[attr-defined]
    parameter.grad_sample = None  # type: ignore[attr-defined]
    return taken
