"""Party-level differential privacy: clipping and Gaussian noise of each update before it is sent."""

import math

from pellm_lightning.privacy.accountant import (
    MAX_MULTIPLIER,
    Accountant,
    PrivacyAccountant,
    check_accountant,
    check_delta,
)
from pellm_lightning.privacy.adaptive_clipping import AdaptiveClipping
from pellm_lightning.privacy.clipping import check_max_norm


class GaussianMechanism:
    """Gaussian mechanism on a party's update: clipping to a norm, and noise before it is sent.

    It is DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963). A round releases the sum of n participants'
    updates, each clipped to the 2-norm C = ``max_norm`` over all federated parameters together, with noise of
    standard deviation z C in every coordinate, z = ``noise_multiplier``. One release is a Gaussian mechanism
    with the multiplier z, which ``PrivacyAccountant`` composes.

    Neighbouring relation: two federations are neighbours if one party's contribution (update and clipping
    bit) is zero in one of them. So the whole effect of a party's data on its update is protected; that it
    took part, and how long it took, is not.

    Assumptions: all participants have equal weight (weights would change the sensitivity), all take part in
    every round (no amplification by sampling), they follow the protocol, and nothing else that depends on
    the data is sent.

    With ``distributed`` noise each party adds N(0, z^2 C^2 / (n - colluders)), so that the sum has z C even
    after ``colluders`` of the parties have subtracted their own noise. The guarantee holds for the sums only:
    a single update has only part of the noise, so it needs secure aggregation. Every party knows its own
    noise, so ``colluders=0`` protects against outsiders who see the results, 1 against any one party, t
    against t parties that share their knowledge.

    Otherwise each party adds all of N(0, z^2 C^2) to its own update. The guarantee then holds for single
    updates, over any exchange, and the sum is noisier by sqrt(n).

    Args:
        max_norm: Clipping norm C of a party's update, from 2^-64 to 2^64; with ``adaptive`` that of the first
            round.
        noise_multiplier: Noise over clipping norm, z: 50 rounds at epsilon 8 and delta 1e-5 need 4.24 (see
            ``noise_multiplier_for``). 0 clips only, without any guarantee.
        distributed: Whether each party adds its share of the noise, or all of it.
        colluders: Number of parties whose noise is assumed known, with distributed noise.
        adaptive: Adapts the clipping norm to a quantile of the update norms.
        delta: Probability that the bound epsilon may fail; well below one over the number of parties.
        max_epsilon: Training stops before a round would exceed this. Default: no limit, it is only logged.
        accountant: "pld", exact, or "rdp", the usual bound by Rényi divergences.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from pellm_lightning import FederatedAveraging
        >>> mechanism = GaussianMechanism(max_norm=1.0, noise_multiplier=4.24, max_epsilon=8.0)
        >>> callback = FederatedAveraging(every_n_steps=100, privacy=mechanism, weighting="uniform")
    """

    def __init__(
        self,
        max_norm: float,
        noise_multiplier: float,
        *,
        distributed: bool = True,
        colluders: int = 1,
        adaptive: AdaptiveClipping | None = None,
        delta: float = 1e-5,
        max_epsilon: float | None = None,
        accountant: Accountant = "pld",
    ) -> None:
        check_max_norm(max_norm)
        _check_multiplier(noise_multiplier)
        _check_colluders(colluders)
        check_delta(delta)
        check_accountant(accountant)
        _check_max_epsilon(max_epsilon, noise_multiplier)
        _check_bits(adaptive, noise_multiplier)
        self.max_norm = max_norm
        self.noise_multiplier = noise_multiplier
        self.distributed = distributed
        self.colluders = colluders
        self.adaptive = adaptive
        self.delta = delta
        self.max_epsilon = max_epsilon
        self.accountant = accountant

    def noise_std(self, num_participants: int, max_norm: float) -> float:
        """Return the standard deviation of the noise that each party adds to its update.

        It applies to the clipped update, before the multiplication by a share.

        Args:
            num_participants: Number n of parties whose updates are in the sum.
            max_norm: This round's clipping norm C.

        Raises:
            ValueError: If colluders would know all noise.
        """
        multiplier = self.noise_multiplier
        if self.adaptive is not None:
            multiplier = self.adaptive.update_multiplier(multiplier, num_participants)
        return multiplier * max_norm * self._noise_share(num_participants)

    def bit_noise_std(self, num_participants: int) -> float:
        """Return the standard deviation of the noise that each party adds to its bit, +1/2 or -1/2."""
        if self.adaptive is None:
            return 0.0
        return self.adaptive.sum_std(self.noise_multiplier, num_participants) * self._noise_share(
            num_participants
        )

    def check_participants(self, num_participants: int) -> None:
        """Validate that the participants can generate the noise.

        Raises:
            ValueError: If colluders would know all noise.
        """
        if num_participants < 1:
            raise ValueError(
                f"num_participants={num_participants}: noise is shared among at least one party."
            )
        if self.distributed and self.noise_multiplier > 0 and num_participants <= self.colluders:
            raise ValueError(
                f"{num_participants} participants cannot protect an update from {self.colluders}"
                " colluding ones, who know all the noise. Lower colluders, raise the number of parties that"
                " a round needs, or let each add all the noise with distributed=False."
            )

    def epsilon(self, accountant: PrivacyAccountant) -> float:
        """Return the epsilon of an accountant's releases, at this mechanism's delta."""
        return accountant.epsilon(self.delta, self.accountant)

    def epsilon_after(self, accountant: PrivacyAccountant, releases: int = 1) -> float:
        """Return the epsilon as it would be after so many more releases."""
        return accountant.epsilon_after(self.noise_multiplier, self.delta, self.accountant, releases)

    def within_budget(self, accountant: PrivacyAccountant, releases: int = 1) -> bool:
        """Return whether so many more releases stay within ``max_epsilon``."""
        return self.max_epsilon is None or self.epsilon_after(accountant, releases) <= self.max_epsilon

    def __repr__(self) -> str:
        return (
            f"GaussianMechanism(max_norm={self.max_norm}, noise_multiplier={self.noise_multiplier},"
            f" distributed={self.distributed}, colluders={self.colluders}, adaptive={self.adaptive},"
            f" delta={self.delta}, max_epsilon={self.max_epsilon}, accountant={self.accountant!r})"
        )

    def _noise_share(self, num_participants: int) -> float:
        """Return one party's standard deviation over that of the guarantee."""
        self.check_participants(num_participants)
        if not self.distributed or self.noise_multiplier == 0:
            return 1.0
        return 1 / math.sqrt(num_participants - self.colluders)


def _check_multiplier(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"noise_multiplier={value!r} must be a number.")
    if not 0 <= value <= MAX_MULTIPLIER:  # rejects nan
        raise ValueError(
            f"noise_multiplier={value} must be from 0 to 1e6. noise_multiplier_for(epsilon, delta, rounds) in"
            " pellm_lightning.privacy computes it from a budget."
        )


def _check_colluders(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"colluders={value!r} must be an integer >= 0, below the number of parties.")


def _check_max_epsilon(value: float | None, noise_multiplier: float) -> None:
    if value is None:
        return
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"max_epsilon={value} must be a finite number above 0, or None for no limit.")
    if noise_multiplier == 0:
        raise ValueError(
            f"max_epsilon={value} cannot be kept with noise_multiplier=0: without noise epsilon is infinite."
            " Give a noise multiplier, or omit max_epsilon to clip only."
        )


def _check_bits(adaptive: AdaptiveClipping | None, noise_multiplier: float) -> None:
    if adaptive is None or adaptive.bit_std is None:
        return
    if 2 * adaptive.bit_std <= noise_multiplier:
        raise ValueError(
            f"bit_std={adaptive.bit_std} of adaptive clipping must be above half the"
            f" noise_multiplier={noise_multiplier}: the bits alone would exceed a round's cost."
            " Raise it, or omit it."
        )
