"""FedNova: parties that make more or larger local steps do not count more for it."""

from collections.abc import Mapping
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
    """Divides each party's update by the reach of its steps, and multiplies their mean by the mean reach.

    Wang et al. 2020 (arXiv:2007.07481), with the shares w_i and ``u_i = anchor - x_i``::

        x = anchor - sum(w_i a_i) sum(w_i u_i / a_i)

    a_i is how far the party's optimizer would have moved by a gradient of 1: the paper's ``|a_i|_1`` times
    the learning rate. For SGD it is the sum of the learning rates, for momentum rho and tau steps of one
    learning rate that times ``(tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho)``
    (test_momentum_has_the_closed_form); schedules, Nesterov and dampening are followed step by step.

    It cures what uneven steps do to the weighting: FedAvg goes to the minimiser of the losses weighted by
    ``w_i a_i``, FedNova, with small learning rates, to that of the losses weighted by ``w_i``
    (test_fednova_fixed_point). What large steps do to parties of unlike curvature remains; see SCAFFOLD. One
    number crosses beside the update. Where all parties reach equally far it is federated averaging, up to
    rounding.

    Local optimizers must be ``SGD``, with one setting for all that federates; with momentum rounds must clear
    it (``inner_optimizer_state="reset"``). Adaptive ones are refused: their reach is not known. Gradients may
    be clipped, which makes them smaller but no other. Weights should not grow with the steps: take
    ``weighting="uniform"`` or numbers if parties pass over their data unequally often in a round.
    """

    def __init__(self) -> None:
        super().__init__()
        self._reach = 0.0
        self._velocity = 0.0

    @property
    @override
    def auxiliary(self) -> AuxiliaryTerms:
        """The party's reach."""
        return AuxiliaryTerms("FedNova()", rescales=True)

    @override
    def check(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], *, resets: bool) -> None:
        """Refuse an optimizer of which is not known how far it reaches."""
        if type(optimizer) is not torch.optim.SGD:
            raise MisconfigurationException(
                "FedNova knows how far SGD moves the parameters by a gradient, not"
                f" {type(optimizer).__name__}, which scales gradients as it goes. Use torch.optim.SGD, or"
                " SCAFFOLD or FedDyn, which take any optimizer."
            )
        groups = _federated_groups(optimizer, set(parameters.values()))
        for setting in _SETTINGS:
            if len({float(group[setting]) for group in groups}) > 1:
                raise MisconfigurationException(
                    f"The parameter groups that federate have different {setting}"
                    f" ({', '.join(str(group[setting]) for group in groups)}), so they reach unequally far."
                    " FedNova needs one setting: put them into one group."
                )
        if any(group["momentum"] for group in groups) and not resets:
            raise MisconfigurationException(
                "FedNova counts a round's own steps, but momentum carries the last round's into it. Set"
                " FederatedAveraging(inner_optimizer_state='reset'), or momentum=0."
            )

    @override
    def _start(self, mean: Mapping[str, Tensor]) -> None:
        self._reach = self._velocity = 0.0

    @override
    def _stepped(self, optimizer: Optimizer) -> None:
        group = next(iter(_federated_groups(optimizer, self._names)), None)
        if group is None:
            return
        lr, momentum = float(group["lr"]), float(group["momentum"])
        # torch's SGD with a gradient of 1; the first gradient becomes the velocity undamped.
        is_first = self._velocity == 0.0
        self._velocity = 1.0 if is_first else momentum * self._velocity + 1.0 - float(group["dampening"])
        if not momentum:
            self._reach += lr
        elif group["nesterov"]:
            self._reach += lr * (1.0 + momentum * self._velocity)
        else:
            self._reach += lr * self._velocity

    @override
    def _give(self) -> AuxiliaryValues:
        return AuxiliaryValues(effective_steps=self._reach)

    @override
    def _saved(self) -> dict[str, Any]:
        return {"reach": self._reach, "velocity": self._velocity}

    @override
    def _load(self, saved: Mapping[str, Any], mean: Mapping[str, Tensor]) -> None:
        self._reach, self._velocity = saved["reach"], saved["velocity"]


def _federated_groups(optimizer: Optimizer, parameters: Any) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if any(p in parameters for p in group["params"])]
