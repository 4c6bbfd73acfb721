"""FedDyn: each party's loss is regularised so that the parties' minimisers meet."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from pellm_lightning.callbacks.drift.base import DriftCorrection, Named, check_coefficient, clones
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues


class FedDyn(DriftCorrection):
    """Adds ``alpha (x - anchor) - h_i`` to the gradient; h_i is the party's gradient as the rounds tell it.

    Acar et al. 2021 (arXiv:2111.04263). After a round ``h_i = h_i - alpha (x_i - anchor)``, h is the mean of
    the h_i weighted as the updates are, and ``x = sum(w_i x_i) - h / alpha``: test_feddyn_equals_the_paper.
    Where it rests all parties agree and ``sum(w_i grad f_i) = 0``, whatever steps each makes and by which
    optimizer: test_reaches_the_minimiser. It does not use learning rates, so schedules, clipping and skipped
    steps need no care. Far from convergence it can overshoot: the fewer local steps, the larger alpha should
    be.

    The paper's server adds up changes of h, which counts on every party's memory for ever. Here the h_i
    themselves are averaged in every round, over who counts in it: the same while all count alike, and a party
    that is lost, comes late or resumes an old state leaves no error behind. That costs a second vector as
    large as the update in each round. ``outer_optimizer`` and ``outer_scheduler`` must be left out: the rule
    itself says where the global parameters go. With one party it is not plain training, but goes to the same
    minimiser.

    Args:
        alpha: Strength of the regulariser, in units of the loss's curvature. The paper's values are 0.001 to
            0.1.

    Raises:
        ValueError: If alpha is not above 0 and finite.
    """

    def __init__(self, alpha: float) -> None:
        check_coefficient("alpha", alpha, positive=True)
        super().__init__()
        self.alpha = alpha
        self._anchors: Named = {}
        self._given: Named = {}

    @property
    @override
    def auxiliary(self) -> AuxiliaryTerms:
        """The party's memory, whose mean moves the global parameters."""
        return AuxiliaryTerms(f"FedDyn(alpha={self.alpha})", vector=True, vector_coefficient=1 / self.alpha)

    @override
    def _start(self, mean: Mapping[str, Tensor]) -> None:
        self._anchors = self._anchor()
        if not self._error_feedback:
            self._error_feedback = self._zeros()

    @override
    def _correct_(self, name: str, parameter: nn.Parameter, grad: Tensor, lr: float) -> None:
        grad.add_(parameter.detach() - self._anchors[name], alpha=self.alpha).sub_(self._error_feedback[name])

    @override
    def _give(self) -> AuxiliaryValues:
        self._given = {
            name: torch.sub(own, self._parameters[name].float() - self._anchors[name], alpha=self.alpha)
            for name, own in self._error_feedback.items()
        }
        return AuxiliaryValues(vector=self._given)

    @override
    def _keep(self) -> None:
        self._error_feedback = self._given

    @override
    def _saved(self) -> dict[str, Any]:
        return {"anchor": clones(self._anchors), "error_feedback": clones(self._error_feedback)}

    @override
    def _load(self, saved: Mapping[str, Any], mean: Mapping[str, Tensor]) -> None:
        self._anchors = self._placed(saved["anchor"])
        self._error_feedback = self._placed(saved["error_feedback"])
