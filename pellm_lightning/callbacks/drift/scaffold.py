"""SCAFFOLD, a drift correction by control variates."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pellm_lightning.callbacks.drift.base import DriftCorrection, Named, clones
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues


class SCAFFOLD(DriftCorrection):
    """Control variates: adds ``c - c_i``, the last round's mean gradient minus the party's, to the gradient.

    Karimireddy et al. 2020 (arXiv:1910.06378). c_i becomes the mean of the party's gradients over the round's
    steps, each before its correction and weighted by the learning rate of its step; c is the mean of the c_i,
    weighted as the updates are. With plain SGD that c_i is the paper's option II, ``c_i - c + (anchor - x_i)
    / (sum of learning rates)`` (test_scaffold_equals_the_paper), computed from gradients, not parameters, so
    that schedules, momentum, clipping, bfloat16 parameters and steps skipped by ``16-mixed`` do not bias it.

    For any numbers of steps the fixed point is the minimiser of the weighted loss:
    test_reaches_the_minimiser. That holds for any local optimizer that makes no step on a zero gradient; the
    paper's convergence rates are for SGD.

    The paper accumulates changes of c_i in c, which relies on every party's state forever. Here the c_i
    themselves are averaged in every round over its participants: equivalent while all have equal weight, and
    a party that is lost, joins late or resumes an old state leaves no error. A party without a c_i is not
    corrected in its first round. A second vector as large as the update is sent in each round.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> callbacks = [FederatedAveraging(every_n_steps=100), SCAFFOLD()]
    """

    def __init__(self) -> None:
        super().__init__()
        self._contributed: Named = {}
        self._shift: Named = {}
        self._gradients: Named = {}
        self._rates: dict[str, float] = {}

    @property
    @override
    def auxiliary(self) -> AuxiliaryTerms:
        """The party's control variate c_i."""
        return AuxiliaryTerms("SCAFFOLD()", vector=True)

    @override
    def _start(self, mean: Mapping[str, Tensor]) -> None:
        if not self._control:
            self._control = clones(mean)
        self._shift = {name: mean[name] - own for name, own in self._control.items()}
        self._gradients = self._zeros()
        self._rates = dict.fromkeys(self._parameters, 0.0)

    @override
    def _correct_(self, names: list[str], parameters: list[Tensor], grads: list[Tensor], lr: float) -> None:
        torch._foreach_add_([self._gradients[name] for name in names], grads, alpha=lr)
        torch._foreach_add_(grads, [self._shift[name] for name in names])
        for name in names:
            self._rates[name] += lr

    @override
    def _contribute(self) -> AuxiliaryValues:
        # Parameters that were not trained, such as a frozen factor, have no new gradient.
        self._contributed = {
            name: total / self._rates[name] if self._rates[name] else self._control[name]
            for name, total in self._gradients.items()
        }
        return AuxiliaryValues(vector=self._contributed)

    @override
    def _commit(self) -> None:
        self._control = self._contributed

    @override
    def _method_state(self) -> dict[str, Any]:
        return {
            "control": clones(self._control),
            "gradients": clones(self._gradients),
            "rates": dict(self._rates),
        }

    @override
    def _load(self, saved: Mapping[str, Any], mean: Mapping[str, Tensor]) -> None:
        self._control = self._placed(saved["control"])
        self._shift = {name: mean[name] - own for name, own in self._control.items()}
        self._gradients = self._placed(saved["gradients"])
        self._rates = dict(saved["rates"])
