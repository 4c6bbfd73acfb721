"""FedNova, normalised averaging for parties with different numbers and sizes of local steps."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from pellm_lightning.callbacks.drift.base import DriftCorrection
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues

_SETTINGS = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize")


class FedNova(DriftCorrection):
    """Normalised averaging: divides updates by their effective steps, and rescales the mean by their mean.

    Wang et al. 2020 (arXiv:2007.07481), with the shares w_i and ``u_i = anchor - x_i``::

        x = anchor - sum(w_i a_i) sum(w_i u_i / a_i)

    a_i are the effective steps, how far the party's optimizer moves by a constant gradient of 1: the paper's
    ``|a_i|_1`` times the learning rate. For SGD it is the sum of the learning rates, for momentum rho and tau
    steps of one learning rate that times ``(tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho)``
    (test_momentum_has_the_closed_form); schedules, Nesterov and dampening are tracked step by step.

    It removes the objective inconsistency of uneven steps: FedAvg converges to the minimiser of the losses
    weighted by ``w_i a_i``, FedNova, with small learning rates, to that of the losses weighted by ``w_i``
    (test_fednova_fixed_point). Drift by large steps with different curvatures remains; see SCAFFOLD. One more
    number is sent. With equal effective steps it is federated averaging, up to rounding.

    Local optimizers must be ``SGD``, with equal settings for all federated parameters; with momentum rounds
    must reset it (``inner_optimizer_state="reset"``). Adaptive ones are refused: their effective steps are
    unknown. Gradients may be clipped. Weights should not grow with the steps: use ``weighting="uniform"`` or
    numbers if parties make different numbers of epochs in a round.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callbacks = [FederatedAveraging(every_n_steps=100, weighting="uniform"), FedNova()]
    """

    def __init__(self) -> None:
        super().__init__()
        self._effective_steps = 0.0
        self._velocity = 0.0

    @property
    @override
    def auxiliary(self) -> AuxiliaryTerms:
        """Rescaling by the effective steps."""
        return AuxiliaryTerms("FedNova()", rescales=True)

    @override
    def check(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], *, resets: bool) -> None:
        """Validate that the optimizer is SGD with equal settings."""
        if type(optimizer) is not torch.optim.SGD:
            raise MisconfigurationException(
                "FedNova knows the effective steps of SGD, not of"
                f" {type(optimizer).__name__}, which rescales gradients. Use torch.optim.SGD, or"
                " SCAFFOLD or FedDyn, which take any optimizer."
            )
        groups = _federated_groups(optimizer, {id(p) for p in parameters.values()})
        for setting in _SETTINGS:
            if len({float(group[setting]) for group in groups}) > 1:
                raise MisconfigurationException(
                    f"The federated parameter groups have different {setting}"
                    f" ({', '.join(str(group[setting]) for group in groups)}), but FedNova"
                    " needs equal ones: put them into one group."
                )
        if any(group["momentum"] for group in groups) and not resets:
            raise MisconfigurationException(
                "FedNova counts the steps of a round, but momentum carries over from the last one. Set"
                " FederatedAveraging(inner_optimizer_state='reset'), or momentum=0."
            )

    @override
    def _start(self, mean: Mapping[str, Tensor]) -> None:
        self._effective_steps = self._velocity = 0.0

    @override
    def _stepped(self, optimizer: Optimizer) -> None:
        group = next(iter(_federated_groups(optimizer, self._names)), None)
        if group is None:
            return
        lr, momentum = float(group["lr"]), float(group["momentum"])
        # torch's SGD with a gradient of 1; the first gradient is not dampened.
        is_first = self._velocity == 0.0
        self._velocity = 1.0 if is_first else momentum * self._velocity + 1.0 - float(group["dampening"])
        if not momentum:
            self._effective_steps += lr
        elif group["nesterov"]:
            self._effective_steps += lr * (1.0 + momentum * self._velocity)
        else:
            self._effective_steps += lr * self._velocity

    @override
    def _contribute(self) -> AuxiliaryValues:
        return AuxiliaryValues(effective_steps=self._effective_steps)

    @override
    def _method_state(self) -> dict[str, Any]:
        return {"effective_steps": self._effective_steps, "velocity": self._velocity}

    @override
    def _load(self, saved: Mapping[str, Any], mean: Mapping[str, Tensor]) -> None:
        self._effective_steps, self._velocity = saved["effective_steps"], saved["velocity"]


def _federated_groups(optimizer: Optimizer, ids: Collection[int]) -> list[dict[str, Any]]:
    """Return the groups with a parameter whose id is among ``ids``."""
    return [group for group in optimizer.param_groups if any(id(p) in ids for p in group["params"])]
