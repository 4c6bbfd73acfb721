"""Auxiliary terms of a round, besides the parties' updates: control variates and normalised steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pellm_lightning.tensors.flat_buffer import is_finite


@dataclass(frozen=True)
class AuxiliaryTerms:
    """Auxiliary terms that a method adds to the rounds; the same at every party.

    With a share w_i per party, update u_i = anchor - x_i, vector v_i and effective steps a_i, the mean of the
    updates ``g = sum(w_i u_i)`` becomes ``g = sum(w_i a_i) sum(w_i u_i / a_i)`` if it rescales, and
    ``g + vector_coefficient v`` where ``v = sum(w_i v_i)``. The outer optimizer steps on that. All sums go
    through the exchange, as the updates do, so secure aggregation hides them.

    Args:
        method: The method and its settings, which must be the same at every party.
        vector: Whether a vector of each party, (D,) float32, is sent with its update. Its mean is part of the
            global state: it is in checkpoints, and is sent to parties that come late.
        rescales: Whether updates are divided by the party's effective steps.
        vector_coefficient: Factor with which the mean vector is added to the pseudo-gradient.

    Example:
        >>> AuxiliaryTerms("SCAFFOLD()", vector=True).sums
        True
    """

    method: str
    vector: bool = False
    rescales: bool = False
    vector_coefficient: float = 0.0

    @property
    def sums(self) -> bool:
        """Whether more is summed than the updates, or other values in their place."""
        return self.vector or self.rescales

    def check(self, *, private: bool, plain: bool) -> None:
        """Refuse settings that the method cannot be combined with.

        Args:
            private: Whether differential privacy is used.
            plain: Whether the outer optimizer's step gives the mean in every round, as that of SGD(lr=1).

        Raises:
            ValueError: If it cannot.
        """
        if private and self.sums:
            raise ValueError(
                f"{self.method} sums more than the clipped and noisy updates, which differential privacy of a"
                " party does not cover. Use FedProx, which adds nothing to what leaves a party; or no"
                " privacy=GaussianMechanism(...)."
            )
        if self.vector_coefficient and not plain:
            raise ValueError(
                f"{self.method} says itself where the global parameters go, and another outer_optimizer or an"
                " outer_scheduler would undo that. Leave out both, which is SGD with lr=1."
            )

    def check_contribution(
        self, contribution: "AuxiliaryValues | None", shapes: Mapping[str, list[int]], who: str
    ) -> None:
        """Refuse a contribution that is not what the method asks for.

        Args:
            contribution: Of a party that counts.
            shapes: Of the parameters, by name.
            who: Begins the error: which party comes to which round.

        Raises:
            ValueError: If it is missing, reaches no finite distance, or has a vector of other shapes.
        """
        if not self.sums:
            return
        who = f"{who} of {self.method}"
        if contribution is None:
            raise ValueError(
                f"{who} without a contribution. Pass step(..., contribution=AuxiliaryValues(...))."
            )
        if not (math.isfinite(contribution.effective_steps) and contribution.effective_steps >= 0):
            raise ValueError(
                f"{who} with effective_steps={contribution.effective_steps}; it must be finite and >= 0: the"
                " sum of the learning rates of its steps."
            )
        given = {name: list(part.shape) for name, part in contribution.vector.items()}
        if self.vector and given != shapes:
            first = next(name for name in sorted({*given, *shapes}) if given.get(name) != shapes.get(name))
            raise ValueError(
                f"{who} with a vector that does not fit the parameters: {first!r} has shape"
                f" {given.get(first)} there and {shapes.get(first)} here. Give one tensor per parameter."
            )


@dataclass(frozen=True)
class AuxiliaryValues:
    """Auxiliary values that one party gives to a round besides its update.

    Args:
        effective_steps: Divisor of its update if updates are rescaled, >= 0; at 0 the update counts as zero.
        vector: Its vector by name of the parameters, float32, each of the parameter's shape.

    Example:
        >>> import torch
        >>> AuxiliaryValues(effective_steps=2.0, vector={"w": torch.zeros(3)}).first_nonfinite() is None
        True
    """

    effective_steps: float = 1.0
    vector: Mapping[str, Tensor] = field(default_factory=dict)

    def first_nonfinite(self) -> str | None:
        """Return the name of the first parameter whose part of the vector holds NaN or infinity."""
        return next((name for name, part in self.vector.items() if not is_finite(part)), None)
