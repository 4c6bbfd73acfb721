"""SCAFFOLD: each party corrects its gradients by what it knows of the others'."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from pellm_lightning.callbacks.drift.base import DriftCorrection, Named, clones
from pellm_lightning.engine.auxiliary import AuxiliaryTerms, AuxiliaryValues


class SCAFFOLD(DriftCorrection):
    """Adds ``c - c_i`` to the gradient: all parties' mean gradient less its own, as of the last round.

    Karimireddy et al. 2020 (arXiv:1910.06378). c_i becomes the mean of the party's gradients over the round's
    steps, each before its correction and weighted by the learning rate of its step; c is the mean of the c_i,
    weighted as the updates are. With plain SGD that c_i is the paper's option II, ``c_i - c + (anchor - x_i)
    / (sum of learning rates)`` (test_scaffold_equals_the_paper), taken from the gradients and not from the
    parameters, so that schedules, momentum, clipping, bfloat16 parameters and steps that ``16-mixed`` skips
    do not spoil it.

    Whatever number of steps each party makes, the minimiser of the weighted loss is where it rests:
    test_reaches_the_minimiser. That holds for any local optimizer that stands still on a zero gradient; the
    paper's rates of convergence are those of SGD.

    The paper adds changes of c_i to c, which counts on every party's memory for ever. Here the c_i themselves
    are averaged in every round, over who counts in it: the same while all count alike, and a party that is
    lost, comes late or resumes an old state leaves no error behind. A party without a c_i is not corrected in
    its first round. A second vector as large as the update crosses in each round.
    """

    def __init__(self) -> None:
        super().__init__()
        self._given: Named = {}
        self._shift: Named = {}
        self._gradients: Named = {}
        self._rates: dict[str, float] = {}

    @property
    @override
    def auxiliary(self) -> AuxiliaryTerms:
        """The party's mean gradient."""
        return AuxiliaryTerms("SCAFFOLD()", vector=True)

    @override
    def _start(self, mean: Mapping[str, Tensor]) -> None:
        if not self._error_feedback:
            self._error_feedback = clones(mean)
        self._shift = {name: mean[name] - own for name, own in self._error_feedback.items()}
        self._gradients = self._zeros()
        self._rates = dict.fromkeys(self._parameters, 0.0)

    @override
    def _correct_(self, name: str, parameter: nn.Parameter, grad: Tensor, lr: float) -> None:
        self._gradients[name].add_(grad, alpha=lr)
        self._rates[name] += lr
        grad.add_(self._shift[name])

    @override
    def _give(self) -> AuxiliaryValues:
        # What was not trained, as a factor that rests, has no new gradient.
        self._given = {
            name: total / self._rates[name] if self._rates[name] else self._error_feedback[name]
            for name, total in self._gradients.items()
        }
        return AuxiliaryValues(vector=self._given)

    @override
    def _keep(self) -> None:
        self._error_feedback = self._given

    @override
    def _saved(self) -> dict[str, Any]:
        return {
            "error_feedback": clones(self._error_feedback),
            "gradients": clones(self._gradients),
            "rates": dict(self._rates),
        }

    @override
    def _load(self, saved: Mapping[str, Any], mean: Mapping[str, Tensor]) -> None:
        self._error_feedback = self._placed(saved["error_feedback"])
        self._shift = {name: mean[name] - own for name, own in self._error_feedback.items()}
        self._gradients = self._placed(saved["gradients"])
        self._rates = dict(saved["rates"])
