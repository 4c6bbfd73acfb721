"""FedDyn, a drift correction by dynamic regularisation of the local losses."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pellm_lightning.callbacks.drift.base import DriftCorrection, Named, check_coefficient, clones
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues


class FedDyn(DriftCorrection):
    """Dynamic regularisation: adds ``alpha (x - anchor) - h_i`` to the gradient, with the party's state h_i.

    Acar et al. 2021 (arXiv:2111.04263). After a round ``h_i = h_i - alpha (x_i - anchor)``, h is the mean of
    the h_i weighted as the updates are, and ``x = sum(w_i x_i) - h / alpha``: test_feddyn_equals_the_paper.
    At a fixed point all parties agree and ``sum(w_i grad f_i) = 0``, for any numbers of steps and local
    optimizers: test_reaches_the_minimiser. It does not depend on learning rates, schedules, clipping and
    skipped steps. Far from convergence it can overshoot: fewer local steps need a larger alpha.

    The paper's server accumulates changes of h, which relies on every party's state forever. Here the h_i
    themselves are averaged in every round over its participants: equivalent while all have equal weight, and
    a party that is lost, joins late or resumes an old state leaves no error. That costs a second vector as
    large as the update in each round. ``outer_optimizer`` and ``outer_scheduler`` must not be set: the method
    defines the global update. With one party it is not plain training, but has the same minimiser.

    Args:
        alpha: Strength of the regulariser, in units of the loss's curvature. The paper's values are 0.001 to
            0.1.

    Raises:
        ValueError: If alpha is not above 0 and finite.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callbacks = [FederatedAveraging(every_n_steps=100), FedDyn(alpha=0.01)]
    """

    def __init__(self, alpha: float) -> None:
        check_coefficient("alpha", alpha, positive=True)
        super().__init__()
        self.alpha = alpha
        self._anchors: Named = {}
        self._contributed: Named = {}

    @property
    @override
    def auxiliary(self) -> AuxiliaryTerms:
        """The party's state h_i, whose mean changes the global parameters."""
        return AuxiliaryTerms(f"FedDyn(alpha={self.alpha})", vector=True, vector_coefficient=1 / self.alpha)

    @override
    def _start(self, mean: Mapping[str, Tensor]) -> None:
        self._anchors = self._anchor()
        if not self._control:
            self._control = self._zeros()

    @override
    def _correct_(self, names: list[str], parameters: list[Tensor], grads: list[Tensor], lr: float) -> None:
        away = torch._foreach_sub(parameters, [self._anchors[name] for name in names])
        torch._foreach_add_(grads, away, alpha=self.alpha)
        torch._foreach_sub_(grads, [self._control[name] for name in names])

    @override
    def _contribute(self) -> AuxiliaryValues:
        self._contributed = {
            name: torch.sub(own, self._parameters[name].float() - self._anchors[name], alpha=self.alpha)
            for name, own in self._control.items()
        }
        return AuxiliaryValues(vector=self._contributed)

    @override
    def _commit(self) -> None:
        self._control = self._contributed

    @override
    def _method_state(self) -> dict[str, Any]:
        return {"anchor": clones(self._anchors), "control": clones(self._control)}

    @override
    def _load(self, saved: Mapping[str, Any], mean: Mapping[str, Tensor]) -> None:
        self._anchors = self._placed(saved["anchor"])
        self._control = self._placed(saved["control"])
