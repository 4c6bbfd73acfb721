"""FedProx, a proximal term that keeps local parameters near the round's anchor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pellm_lightning.callbacks.drift.base import DriftCorrection, Named, check_coefficient, clones
from pellm_lightning.engine.auxiliary import AuxiliaryTerms


class FedProx(DriftCorrection):
    """Proximal term ``mu/2 |x - anchor|^2`` in each party's loss: adds ``mu (x - anchor)`` to the gradient.

    Li et al. 2020 (arXiv:1812.06127): test_fedprox_reaches_the_proximal_solution. It is local to a party:
    nothing more is sent, and it supports every aggregation rule, exchange and kind of privacy. ``mu=0``
    changes no bit: test_without_effect_to_the_bit. It reduces drift without removing it: the fixed point is
    near, not at, the minimiser of the weighted loss.

    Args:
        mu: Strength of the proximal term, in units of the loss's curvature. The paper's values are 0.001 to
            1.

    Raises:
        ValueError: If mu is negative or not finite.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callbacks = [FederatedAveraging(every_n_steps=100), FedProx(mu=0.01)]
    """

    def __init__(self, mu: float) -> None:
        check_coefficient("mu", mu, positive=False)
        super().__init__()
        self.mu = mu
        self._anchors: Named = {}

    @property
    @override
    def auxiliary(self) -> AuxiliaryTerms:
        """The setting only, which must be equal at all parties."""
        return AuxiliaryTerms(f"FedProx(mu={self.mu})")

    @override
    def _start(self, mean: Mapping[str, Tensor]) -> None:
        self._anchors = self._anchor()

    @override
    def _correct_(self, names: list[str], parameters: list[Tensor], grads: list[Tensor], lr: float) -> None:
        if self.mu:  # -0.0 + 0.0 would change a bit
            away = torch._foreach_sub(parameters, [self._anchors[name] for name in names])
            torch._foreach_add_(grads, away, alpha=self.mu)

    @override
    def _method_state(self) -> dict[str, Any]:
        return {"anchor": clones(self._anchors)}

    @override
    def _load(self, saved: Mapping[str, Any], mean: Mapping[str, Tensor]) -> None:
        self._anchors = self._placed(saved["anchor"])
