"""Postprocessor of a party's updates: applies a mechanism round by round and accounts for it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pellm_lightning.privacy.accountant import PrivacyAccountant
from pellm_lightning.privacy.clipping import check_max_norm, clip_, clip_factor
from pellm_lightning.privacy.mechanism import GaussianMechanism
from pellm_lightning.privacy.noise import Noise


class DPProcessor:
    """Processor that privatizes a party's updates; owns the clipping norm and the accountant.

    Both are part of the global state: the same at all parties.

    Args:
        mechanism: The mechanism and its budget.

    Raises:
        ValueError: If not even one round stays within ``max_epsilon``.
        ImportError: If dp-accounting is not installed.

    Example:
        >>> processor = DPProcessor(GaussianMechanism(max_norm=1.0, noise_multiplier=4.0))
        >>> processor.prepare(norm=10.0, num_participants=4)
        >>> noisy = processor.privatize_(Tensor([1.0] * 100))
        >>> processor.end_round(releases=1, mean_bit=None)
        >>> processor.accountant.releases
        1
    """

    def __init__(self, mechanism: GaussianMechanism) -> None:
        self.mechanism = mechanism
        self.max_norm = float(mechanism.max_norm)
        """Clipping norm of the next round."""
        self.accountant = PrivacyAccountant()
        self.releases = 0
        """Releases of the current round's attempts, failed ones included."""
        self._noise = Noise()
        self._factor = self._std = 0.0
        if not mechanism.within_budget(self.accountant):
            first = mechanism.epsilon_after(self.accountant)
            raise ValueError(
                f"The first round alone would cost epsilon={first:.3g}, more than"
                f" max_epsilon={mechanism.max_epsilon}. Raise noise_multiplier: noise_multiplier_for(epsilon,"
                " delta, rounds) in pellm_lightning.privacy computes it from a budget."
            )

    @property
    def epsilon(self) -> float:
        """Epsilon of all releases so far, at the mechanism's delta."""
        return self.mechanism.epsilon(self.accountant)

    @property
    def min_participants(self) -> int:
        """Minimum number of participants for the noise to protect each of them."""
        shares_noise = self.mechanism.distributed and self.mechanism.noise_multiplier > 0
        return self.mechanism.colluders + 1 if shares_noise else 1

    def within_budget(self, failed: int = 0) -> bool:
        """Return whether the budget allows one more round, after a number of failed attempts at it."""
        return self.mechanism.within_budget(self.accountant, 1 + failed)

    def prepare(self, norm: float, num_participants: int) -> None:
        """Compute the clipping factor and the noise of an update with the given norm."""
        self._factor = clip_factor(norm, self.max_norm)
        self._std = self.mechanism.noise_std(num_participants, self.max_norm)

    def privatize_(self, chunk: Tensor) -> Tensor:
        """Clip a chunk of the update and add noise, in place; flat float32."""
        return self._noise.add_(clip_(chunk, self._factor), self._std)

    def noisy_bit(self, norm: float, num_participants: int) -> float:
        """Return the noisy clipping bit: +1/2 if the norm is within the bound, else -1/2; or 0."""
        adaptive = self.mechanism.adaptive
        if adaptive is None:
            return 0.0
        return self._noise.draw(
            adaptive.bit(norm, self.max_norm), self.mechanism.bit_noise_std(num_participants)
        )

    def end_round(self, releases: int, mean_bit: float | None) -> None:
        """Account for a round's releases, and update the clipping norm.

        Args:
            releases: Number of releases in the round, failed attempts included.
            mean_bit: Mean of the participants' noisy bits; None if the round had no effect.
        """
        for _ in range(releases):
            self.accountant.release(self.mechanism.noise_multiplier)
        if mean_bit is not None and self.mechanism.adaptive is not None:
            self.max_norm = self.mechanism.adaptive.updated(self.max_norm, mean_bit)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, which is equal at all parties, as plain containers."""
        return {"max_norm": self.max_norm, "accountant": self.accountant.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of ``state_dict``; nothing changes if it is invalid.

        Raises:
            ValueError: If it is invalid; it may come from a peer.
        """
        max_norm = state.get("max_norm") if isinstance(state, Mapping) else None
        if not isinstance(max_norm, float):
            raise ValueError(f"The state of differential privacy holds no clipping norm: {state!r:.100}.")
        check_max_norm(max_norm)
        self.accountant.load_state_dict(state["accountant"])
        self.max_norm = max_norm
