"""The base class of drift corrections: callbacks that correct gradients before each optimizer step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from operator import is_
from typing import Any, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from pellm_lightning.callbacks.dp_sgd import DPSGD
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues
from pellm_lightning.engine.outer_optimizer import is_plain_averaging
from pellm_lightning.loop.aggregator_factory import AggregatorFactory
from pellm_lightning.tensors.flat_buffer import is_finite
from pellm_lightning.trainer.isolation import callbacks_of
from pellm_lightning.trainer.pickling import own_state

Named: TypeAlias = dict[str, Tensor]
"""Tensors by the names of the federated parameters, each of its parameter's shape and on its device."""


class DriftCorrection(Callback, ABC):
    """Drift correction of a party's local steps; ``FederatedAveraging`` calls it when rounds begin and end.

    Lightning calls ``on_before_optimizer_step`` once per optimizer step, after gradients were accumulated,
    averaged over the processes of a party and unscaled, and before they are clipped: a correction acts like
    a term of the loss. All processes of a party compute the same. A step that ``16-mixed`` skips because a
    gradient overflowed is neither corrected nor counted.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> from pellm_lightning.callbacks.drift import SCAFFOLD
        >>> callbacks = [FederatedAveraging(every_n_steps=100), SCAFFOLD()]
    """

    def __init__(self) -> None:
        # State of a fit, dropped at its end.
        self._parameters: dict[str, nn.Parameter] = {}
        self._names: dict[int, str] = {}  # by the parameter's id: the hash of a tensor is slow
        # By the id of an optimizer's group: its parameters, the federated of them, and their names.
        self._groups: dict[int, tuple[list[Tensor], list[Tensor], list[str]]] = {}
        # The party's control variate, kept from round to round, if the method has one.
        self._control: Named = {}
        # The state of a loaded checkpoint, or of the last fit.
        self._state: dict[str, Any] = {}

    # ---- the interface of a method

    @property
    @abstractmethod
    def auxiliary(self) -> AuxiliaryTerms:
        """Auxiliary terms that the method adds to rounds."""

    def check(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], *, resets: bool) -> None:
        """Validate that the method supports a local optimizer.

        Args:
            optimizer: A local optimizer.
            parameters: The federated parameters, by name.
            resets: Whether rounds reset the optimizer's state.

        Raises:
            MisconfigurationException: If it does not.
        """

    @abstractmethod
    def _start(self, mean: Mapping[str, Tensor]) -> None:
        """Begin a round, with the anchor in the parameters and the mean of the parties' vectors."""

    def _correct_(self, names: list[str], parameters: list[Tensor], grads: list[Tensor], lr: float) -> None:
        """Correct the gradients of some parameters in place, all at once: at least one.

        Args:
            names: Names of the parameters.
            parameters: The parameters, detached or under ``no_grad``.
            grads: Their gradients.
            lr: Learning rate of the step to come.
        """

    def _stepped(self, optimizer: Optimizer) -> None:
        """Count an optimizer step, before it is made."""

    def _contribute(self) -> AuxiliaryValues:
        """Return the auxiliary values of the round; the parameters hold the local result."""
        return AuxiliaryValues()

    def _commit(self) -> None:
        """Keep the contributed vector as control variate: the round was committed with this party in it."""

    @abstractmethod
    def _method_state(self) -> dict[str, Any]:
        """Return the method's state, as tensors and plain containers."""

    @abstractmethod
    def _load(self, saved: Mapping[str, Any], mean: Mapping[str, Tensor]) -> None:
        """Load the state of ``_method_state``, in the middle of a round; ``mean`` as in ``_start``."""

    # ---- called by FederatedAveraging, in every process of a party

    def begin(
        self, parameters: Mapping[str, nn.Parameter], mean: Mapping[str, Tensor], *, resumed: bool
    ) -> None:
        """Begin the rounds of a fit.

        Args:
            parameters: The federated parameters, by name.
            mean: The mean of the parties' vectors, by name.
            resumed: Whether the parameters are those of a checkpoint in the middle of a round, not an anchor.

        Raises:
            MisconfigurationException: If the checkpoint has no state of this correction.
        """
        self._parameters, self._control = dict(parameters), {}
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._groups = {}
        if resumed and not self._state:
            raise MisconfigurationException(
                f"The checkpoint was saved without {self.auxiliary.method}, so its anchor is unknown. Resume"
                " with the callbacks of the checkpoint, or start a new run from its weights."
            )
        if self._state:
            self._load(self._state, mean)
        if not resumed:
            self._start(mean)

    def contribution(self) -> AuxiliaryValues:
        """Return this party's auxiliary values for the next round."""
        with torch.no_grad():
            return self._contribute()

    def end_round(self, mean: Mapping[str, Tensor], *, counted: bool) -> None:
        """Begin the next round, with the result of the last one in the parameters.

        Args:
            mean: The mean of the parties' vectors, by name.
            counted: Whether this party participated in the round.
        """
        with torch.no_grad():
            if counted:
                self._commit()
            self._start(mean)

    # ---- hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the state of an earlier fit, which may have failed."""
        if stage == "fit":
            self._parameters, self._names, self._groups, self._state = {}, {}, {}, {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate that ``FederatedAveraging``, which is called first, has begun rounds."""
        if not self._parameters:
            raise MisconfigurationException(
                f"{self.auxiliary.method} corrects the drift between rounds, but there are no rounds. Add"
                " FederatedAveraging() to the Trainer's callbacks."
            )

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Correct the gradients of the federated parameters."""
        if _will_skip(trainer, optimizer):
            return
        for group in optimizer.param_groups:
            parameters, names = self._federated(group)
            grads = [parameter.grad for parameter in parameters]
            trained = [grad for grad in grads if grad is not None]
            if len(trained) < len(grads):
                at = [i for i, grad in enumerate(grads) if grad is not None]
                parameters, names = [parameters[i] for i in at], [names[i] for i in at]
            sparse = next((name for name, g in zip(names, trained, strict=True) if g.is_sparse), None)
            if sparse is not None:
                raise MisconfigurationException(
                    f"The gradient of {sparse!r} is sparse, and {self.auxiliary.method} would make it dense"
                    " in every step. Build the layer with sparse=False."
                )
            if trained:
                self._correct_(names, parameters, trained, float(group["lr"]))
        self._stepped(optimizer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop every reference to the module."""
        if stage == "fit":
            self._state = self.state_dict()
            self._parameters, self._names, self._groups, self._control = {}, {}, {}, {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the callback without the module."""
        return own_state(self, _parameters={}, _names={}, _groups={})

    # ---- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from, also in the middle of a round."""
        return self._method_state() if self._parameters else self._state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the state until training starts, when the federated parameters are known."""
        self._state = state_dict

    # ---- helpers of the methods

    def _federated(self, group: Mapping[str, Any]) -> tuple[list[Tensor], list[str]]:
        """Return the federated parameters of a group and their names, remembered until the group changes."""
        parameters = group["params"]
        seen, federated, names = self._groups.get(id(group), ([], [], []))
        if len(seen) != len(parameters) or not all(map(is_, seen, parameters)):
            federated = [p for p in parameters if id(p) in self._names]
            names = [self._names[id(p)] for p in federated]
            self._groups[id(group)] = [*parameters], federated, names
        return federated, names

    def _anchor(self) -> Named:
        """Return copies of the parameters, in their own dtype."""
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def _zeros(self) -> Named:
        """Return zeros in the parameters' shapes, float32."""
        return {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self._parameters.items()}

    def _placed(self, saved: Mapping[str, Tensor]) -> Named:
        """Copy saved tensors to the devices of the parameters."""
        return {name: saved[name].to(p.device, copy=True) for name, p in self._parameters.items()}


def _only_correction(trainer: Trainer, module: LightningModule) -> DriftCorrection | None:
    """Return the Trainer's drift correction, if it has one.

    Raises:
        MisconfigurationException: If it has several, or an unsupported one.
    """
    found = [callback for callback in callbacks_of(trainer) if isinstance(callback, DriftCorrection)]
    if len(found) > 1:
        raise MisconfigurationException(
            f"The Trainer has {len(found)} drift corrections"
            f" ({', '.join(c.auxiliary.method for c in found)}), which interfere. Keep one."
        )
    for correction in found:
        _check_trainer(trainer, module, correction)
    return found[0] if found else None


def drift_correction(
    factory: AggregatorFactory, trainer: Trainer, module: LightningModule
) -> DriftCorrection | None:
    """Return the Trainer's drift correction, None without.

    Args:
        factory: The arguments of ``FederatedAveraging``.
        trainer: The Trainer.
        module: The module that it trains.

    Raises:
        MisconfigurationException: If it does not go with the other arguments.
    """
    drift = _only_correction(trainer, module)
    if drift is None:
        return None
    if factory.is_staggered:
        raise MisconfigurationException(
            f"{drift.auxiliary.method} corrects each local step by what the last round gave for all"
            " parameters, which with an overlap or fragments is not there yet. Leave out one of them."
        )
    optimizer = factory.outer_optimizer([nn.Parameter(torch.zeros(1))])
    plain = is_plain_averaging(optimizer, scheduled=factory.outer_scheduler is not None)
    try:
        drift.auxiliary.check(private=factory.privacy is not None, plain=plain)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    return drift


def check_optimizers(
    factory: AggregatorFactory,
    trainer: Trainer,
    drift: DriftCorrection | None,
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Refuse local optimizers with which a drift correction would be wrong.

    Raises:
        MisconfigurationException: If one is such.
    """
    if drift is None:
        return
    for optimizer in trainer.optimizers:
        _check_optimizer(trainer, optimizer, drift)
        drift.check(optimizer, parameters, resets=factory.inner_optimizer_state == "reset")


def clones(tensors: Mapping[str, Tensor]) -> Named:
    """Return copies, since a checkpoint may be written while training continues."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def check_coefficient(name: str, value: float, *, positive: bool) -> None:
    """Validate the coefficient of a term.

    Raises:
        ValueError: If it is not finite, negative, or zero where it must be positive.
    """
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}={value} must be a finite number {'above 0' if positive else '>= 0'}.")


def _check_trainer(trainer: Trainer, module: LightningModule, correction: DriftCorrection) -> None:
    method = correction.auxiliary.method
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{method} acts before each optimizer step, and manual optimization may clip gradients before"
            " or call no hooks. Set automatic_optimization=True."
        )
    callbacks = callbacks_of(trainer)
    before = callbacks[: callbacks.index(correction)]
    for other in callbacks:
        if isinstance(other, DPSGD) and other not in before:
            raise MisconfigurationException(
                f"{method} stands before DPSGD in the Trainer's callbacks: it would correct gradients"
                " that DPSGD then replaces, and use them without noise. Put DPSGD"
                " before it."
            )


def _check_optimizer(trainer: Trainer, optimizer: Optimizer, correction: DriftCorrection) -> None:
    """Validate that drift corrections support a local optimizer.

    Raises:
        MisconfigurationException: If they do not.
    """
    method = correction.auxiliary.method
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MisconfigurationException(
            f"{method} corrects one gradient per step, but LBFGS computes several. Use another optimizer."
        )
    if _scaler_of(trainer) is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise MisconfigurationException(
            f"With precision={trainer.precision!r} a fused {type(optimizer).__name__} unscales gradients in"
            f" its step, so {method} would correct scaled ones. Build it with fused=False, or"
            " use bf16-mixed."
        )


def _scaler_of(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _will_skip(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Return whether the gradient scaler will skip the step, since a gradient overflowed."""
    if _scaler_of(trainer) is None:
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not all(is_finite(grad) for grad in grads)
