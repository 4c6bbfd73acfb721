"""FedProx: each party is held near the parameters from which its round began."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from pellm_lightning.callbacks.drift.base import DriftCorrection, Named, check_coefficient, clones
from pellm_lightning.engine.auxiliary import AuxiliaryTerms


class FedProx(DriftCorrection):
    """Adds ``mu (x - anchor)`` to the gradient: each party minimises its loss plus ``mu/2 |x - anchor|^2``.

    Li et al. 2020 (arXiv:1812.06127): test_fedprox_reaches_the_proximal_solution. It acts inside a party
    only: nothing more crosses, and it goes with every aggregation, exchange and kind of privacy. ``mu=0``
    changes no bit: test_without_effect_to_the_bit. It makes drift smaller, yet does not remove it: parties
    whose minimisers differ still end near, not at, the minimiser of the weighted loss.

    Args:
        mu: Strength of the pull, in units of the loss's curvature. The paper's values are 0.001 to 1.

    Raises:
        ValueError: If mu is negative or not finite.
    """

    def __init__(self, mu: float) -> None:
        check_coefficient("mu", mu, positive=False)
        super().__init__()
        self.mu = mu
        self._anchors: Named = {}

    @property
    @override
    def auxiliary(self) -> AuxiliaryTerms:
        """Nothing but the setting, which must be the same everywhere."""
        return AuxiliaryTerms(f"FedProx(mu={self.mu})")

    @override
    def _start(self, mean: Mapping[str, Tensor]) -> None:
        self._anchors = self._anchor()

    @override
    def _correct_(self, name: str, parameter: nn.Parameter, grad: Tensor, lr: float) -> None:
        if self.mu:  # else -0.0 + 0.0 would change a bit
            grad.add_(parameter.detach() - self._anchors[name], alpha=self.mu)

    @override
    def _saved(self) -> dict[str, Any]:
        return {"anchor": clones(self._anchors)}

    @override
    def _load(self, saved: Mapping[str, Any], mean: Mapping[str, Tensor]) -> None:
        self._anchors = self._placed(saved["anchor"])
