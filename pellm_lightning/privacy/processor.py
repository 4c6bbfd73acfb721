"""What a mechanism does in the rounds of one party, and what it remembers of them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pellm_lightning.privacy.accountant import PrivacyAccountant
from pellm_lightning.privacy.clipping import check_max_norm, clip_
from pellm_lightning.privacy.mechanism import GaussianMechanism
from pellm_lightning.privacy.noise import Noise


class DPProcessor:
    """Makes a party's updates private, round by round; keeps the clipping norm and the ledger.

    Both are part of the global state: the same at all parties.

    Args:
        mechanism: What is done to updates, and what it guarantees.

    Raises:
        ValueError: If not even one round stays within ``max_epsilon``.
        ImportError: If dp-accounting is not installed.
    """

    def __init__(self, mechanism: GaussianMechanism) -> None:
        self.mechanism = mechanism
        self.max_norm = float(mechanism.max_norm)
        """Clipping norm of the round that comes."""
        self.accountant = PrivacyAccountant()
        self.releases = 0
        """Releases of attempts at the present round, failed ones included."""
        self._noise = Noise()
        self._factor = self._std = 0.0
        first = PrivacyAccountant()
        first.release(mechanism.noise_multiplier)
        if not mechanism.within_budget(PrivacyAccountant()):
            raise ValueError(
                f"The first round alone would cost epsilon={mechanism.epsilon(first):.3g}, more than"
                f" max_epsilon={mechanism.max_epsilon}. Raise noise_multiplier: noise_multiplier_for(epsilon,"
                " delta, rounds) in pellm_lightning.privacy tells what a budget needs."
            )

    @property
    def epsilon(self) -> float:
        """What all releases so far have cost, at the mechanism's delta."""
        return self.mechanism.epsilon(self.accountant)

    @property
    def min_counting(self) -> int:
        """Fewer parties than that cannot make noise that hides one of them."""
        is_secure = self.mechanism.distributed and self.mechanism.noise_multiplier > 0
        return self.mechanism.colluders + 1 if is_secure else 1

    def within_budget(self, failed: int = 0) -> bool:
        """Tell whether the budget has room for one more round, after so many failed attempts at it."""
        accountant = PrivacyAccountant()
        accountant.load_state_dict(self.accountant.state_dict())
        for _ in range(failed):
            accountant.release(self.mechanism.noise_multiplier)
        return self.mechanism.within_budget(accountant)

    def prepare(self, norm: float, counting: int) -> None:
        """Settle what an update of that norm is multiplied by, and how much noise it gets."""
        self._factor = self.mechanism.clip_factor(norm, self.max_norm)
        self._std = self.mechanism.noise_std(counting, self.max_norm)

    def privatize_(self, chunk: Tensor) -> None:
        """Clip a part of the update and add noise, in place; flat float32."""
        self._noise.add_(clip_(chunk, self._factor), self._std)

    def noisy_bit(self, norm: float, counting: int) -> float:
        """Return whether an update is within the clipping norm, as +1/2 or -1/2, with noise; else 0."""
        adaptive = self.mechanism.adaptive
        if adaptive is None:
            return 0.0
        return self._noise.draw(adaptive.bit(norm, self.max_norm), self.mechanism.bit_noise_std(counting))

    def end_round(self, releases: int, mean_bit: float | None) -> None:
        """Enter what a round has released, and move the clipping norm.

        Args:
            releases: Of the round, those of failed attempts included.
            mean_bit: Mean of the counting parties' noisy bits; None if the round moved nothing.
        """
        for _ in range(releases):
            self.accountant.release(self.mechanism.noise_multiplier)
        if mean_bit is not None and self.mechanism.adaptive is not None:
            self.max_norm = self.mechanism.adaptive.updated(self.max_norm, mean_bit)

    def state_dict(self) -> dict[str, Any]:
        """Return what all parties share of it, as plain containers."""
        return {"max_norm": self.max_norm, "accountant": self.accountant.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; nothing changes if it cannot be read.

        Raises:
            ValueError: If it cannot; it may come from a peer.
        """
        max_norm = state.get("max_norm") if isinstance(state, Mapping) else None
        if not isinstance(max_norm, float):
            raise ValueError(f"The state of differential privacy holds no clipping norm: {state!r:.100}.")
        check_max_norm(max_norm)
        self.accountant.load_state_dict(state["accountant"])
        self.max_norm = max_norm
