"""What a drift correction is: a callback beside FederatedAveraging that acts before each optimizer step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from pellm_lightning.callbacks.dp_sgd import DPSGD
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues
from pellm_lightning.trainer.isolation import callbacks_of
from pellm_lightning.trainer.pickling import own_state

Named: TypeAlias = dict[str, Tensor]
"""Tensors by the names of the federated parameters, each of its parameter's shape and on its device."""


class DriftCorrection(Callback, ABC):
    """Corrects a party's local steps; ``FederatedAveraging`` tells it when rounds begin and end.

    Lightning calls ``on_before_optimizer_step`` once per optimizer step, after gradients were accumulated,
    averaged over the processes of a party and unscaled, and before they are clipped: a correction enters the
    step as if it came from the loss. All processes of a party compute the same. Where ``16-mixed`` will skip
    a step because a gradient overflowed, nothing is done and nothing is counted.
    """

    def __init__(self) -> None:
        # What a fit builds; all of it is dropped when the fit ends.
        self._parameters: dict[str, nn.Parameter] = {}
        self._names: dict[nn.Parameter, str] = {}
        # What the party remembers from round to round, if the method asks for that.
        self._error_feedback: Named = {}
        # The state of a checkpoint that was loaded, or of the fit that has ended.
        self._state: dict[str, Any] = {}

    # ---- what a method says

    @property
    @abstractmethod
    def auxiliary(self) -> AuxiliaryTerms:
        """What the method adds to the rounds."""

    def check(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], *, resets: bool) -> None:
        """Refuse an optimizer with which the method would be wrong.

        Args:
            optimizer: A local optimizer.
            parameters: What federates, by name.
            resets: Whether rounds clear the optimizer's state.

        Raises:
            MisconfigurationException: If it would be.
        """

    @abstractmethod
    def _start(self, mean: Mapping[str, Tensor]) -> None:
        """Begin a round; parameters hold the anchor, ``mean`` is that of what was carried."""

    def _correct_(self, name: str, parameter: nn.Parameter, grad: Tensor, lr: float) -> None:
        """Correct the gradient of a parameter in place."""

    def _stepped(self, optimizer: Optimizer) -> None:
        """Count a step that is about to be made."""

    def _give(self) -> AuxiliaryValues:
        """Return what goes to the round beside the update; parameters still hold the local result."""
        return AuxiliaryValues()

    def _keep(self) -> None:
        """Make what was given the party's own memory: the round stands, and this party counted in it."""

    @abstractmethod
    def _saved(self) -> dict[str, Any]:
        """Return what a resumed run needs, as tensors and plain containers."""

    @abstractmethod
    def _load(self, saved: Mapping[str, Any], mean: Mapping[str, Tensor]) -> None:
        """Take over what ``_saved`` returned, in the middle of a round; ``mean`` as in ``_start``."""

    # ---- what FederatedAveraging calls, in every process of a party

    def begin(
        self, parameters: Mapping[str, nn.Parameter], mean: Mapping[str, Tensor], *, resumed: bool
    ) -> None:
        """Begin the rounds of a fit.

        Args:
            parameters: What federates, by name.
            mean: The mean of what was carried, by name.
            resumed: Whether the parameters are those of a checkpoint, in the middle of a round, and not the
                ones from which a round starts.

        Raises:
            MisconfigurationException: If the checkpoint knows nothing of this correction.
        """
        self._parameters, self._error_feedback = dict(parameters), {}
        self._names = {parameter: name for name, parameter in parameters.items()}
        if resumed and not self._state:
            raise MisconfigurationException(
                f"The checkpoint was saved without {self.auxiliary.method}, which therefore does not know where"
                " its round began. Resume with the callbacks of the checkpoint, or start anew from its"
                " weights."
            )
        if self._state:
            self._load(self._state, mean)
        if not resumed:
            self._start(mean)

    def contribution(self) -> AuxiliaryValues:
        """Return what this party gives to the round that comes."""
        with torch.no_grad():
            return self._give()

    def end_round(self, mean: Mapping[str, Tensor], *, counted: bool) -> None:
        """Begin the next round: the last one stands, and the parameters hold its result.

        Args:
            mean: The mean of what was carried, by name.
            counted: Whether this party counted in the round.
        """
        with torch.no_grad():
            if counted:
                self._keep()
            self._start(mean)

    # ---- hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit, which may have failed."""
        if stage == "fit":
            self._parameters, self._names, self._state = {}, {}, {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there are rounds; ``FederatedAveraging`` stands first in line."""
        if not self._parameters:
            raise MisconfigurationException(
                f"{self.auxiliary.method} corrects the drift between rounds, but there are none. Add"
                " FederatedAveraging() to the Trainer's callbacks."
            )

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Correct the gradients of what federates and was trained."""
        if _will_skip(trainer, optimizer):
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names.get(parameter)
                if name is None or parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise MisconfigurationException(
                        f"The gradient of {name!r} is sparse, and {self.auxiliary.method} would make it dense at"
                        " every step. Build the layer with sparse=False."
                    )
                self._correct_(name, parameter, parameter.grad, float(group["lr"]))
        self._stepped(optimizer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop every reference to the module."""
        if stage == "fit":
            self._state = self.state_dict()
            self._parameters, self._names, self._error_feedback = {}, {}, {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the module of a fit out of a pickled callback or a copy."""
        return own_state(self, _parameters={}, _names={})

    # ---- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on exactly, in the middle of a round too."""
        return self._saved() if self._parameters else self._state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: what federates is not known yet."""
        self._state = state_dict

    # ---- for the methods

    def _anchor(self) -> Named:
        """Return the parameters as they are now, in their own dtype."""
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def _zeros(self) -> Named:
        """Return zeros, float32."""
        return {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self._parameters.items()}

    def _placed(self, saved: Mapping[str, Tensor]) -> Named:
        """Return saved tensors on the devices of the parameters; copies, as the checkpoint lives on."""
        return {name: saved[name].to(p.device, copy=True) for name, p in self._parameters.items()}


def drift_correction_of(trainer: Trainer, module: LightningModule) -> DriftCorrection | None:
    """Return the Trainer's drift correction, if it has one.

    Raises:
        MisconfigurationException: If it has several, or one that could not do its work.
    """
    found = [callback for callback in callbacks_of(trainer) if isinstance(callback, DriftCorrection)]
    if len(found) > 1:
        raise MisconfigurationException(
            f"The Trainer has {len(found)} drift corrections ({', '.join(c.auxiliary.method for c in found)});"
            " each would correct what the others have done. Keep one."
        )
    for correction in found:
        _check_trainer(trainer, module, correction)
    return found[0] if found else None


def clones(tensors: Mapping[str, Tensor]) -> Named:
    """Return copies, since what a checkpoint gets is written while training goes on."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def check_coefficient(name: str, value: float, *, positive: bool) -> None:
    """Check an argument that weighs a term.

    Raises:
        ValueError: If it is not finite, or below zero, or zero where it must be positive.
    """
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}={value} must be a finite number {'above 0' if positive else '>= 0'}.")


def _check_trainer(trainer: Trainer, module: LightningModule, correction: DriftCorrection) -> None:
    method = correction.auxiliary.method
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{method} acts before each optimizer step, which manual optimization makes by itself, after"
            " clipping or without telling anybody. Set automatic_optimization=True."
        )
    callbacks = callbacks_of(trainer)
    before = callbacks[: callbacks.index(correction)]
    for other in callbacks:
        if isinstance(other, DPSGD) and other not in before:
            raise MisconfigurationException(
                f"{method} stands before DPSGD in the Trainer's callbacks: it would correct gradients"
                " that DPSGD then replaces, and learn from them before they are noisy. Put DPSGD"
                " before it."
            )


def check_optimizer(trainer: Trainer, optimizer: Optimizer, correction: DriftCorrection) -> None:
    """Refuse an optimizer whose steps no correction can see right.

    Raises:
        MisconfigurationException: If it is one.
    """
    method = correction.auxiliary.method
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MisconfigurationException(
            f"{method} corrects one gradient per step, but LBFGS computes several. Use another optimizer."
        )
    if _scaler_of(trainer) is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise MisconfigurationException(
            f"With precision={trainer.precision!r} a fused {type(optimizer).__name__} unscales gradients in"
            f" its own step, so {method} would correct scaled ones. Build it with fused=False, or"
            " use bf16-mixed."
        )


def _scaler_of(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _will_skip(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Tell whether the gradient scaler will leave out the step, as it does if any gradient overflowed."""
    if _scaler_of(trainer) is None:
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not all(bool(torch.isfinite(grad).all()) for grad in grads)
