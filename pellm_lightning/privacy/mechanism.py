"""Differential privacy of a whole party: its update is clipped, and noisy before it leaves."""

import math

from pellm_lightning.privacy.accountant import (
    MAX_MULTIPLIER,
    Accountant,
    PrivacyAccountant,
    check_accountant,
    check_delta,
)
from pellm_lightning.privacy.adaptive_clipping import AdaptiveClipping
from pellm_lightning.privacy.clipping import check_max_norm, clip_factor


class GaussianMechanism:
    """Clips a party's update to a norm and adds Gaussian noise before it leaves.

    It is DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963). A round releases the sum of n counting parties'
    updates, each clipped to the 2-norm C = ``max_norm`` over all federated parameters together, with noise of
    standard deviation z C in every coordinate, z = ``noise_multiplier``. One release is a Gaussian mechanism
    with the multiplier z, and costs what `Ledger` says.

    Neighbouring: two federations are neighbours if they differ in what one party contributes, which in the
    other is zero (update, and clipping bit). So what is hidden is everything that a party's data did to its
    update, the whole party at once; that it took part, and how long it took, is not.

    Assumed: all counting parties count alike (weights would change the sensitivity), all take part in every
    round (so nothing is gained by sampling), they follow the protocol, and nothing else that depends on the
    data leaves them.

    With ``distributed`` noise each party adds N(0, z^2 C^2 / (n - colluders)), so that the sum has z C even
    after ``colluders`` of the parties have subtracted what they know they added. That bounds what is learned
    from the sums only: whoever sees a single update sees it with a part of the noise, so it needs a masked
    exchange. Every party knows its own noise, so ``colluders=0`` holds against outsiders who see the results,
    1 against any one party, t against t parties that tell each other all.

    Otherwise each party adds all of N(0, z^2 C^2) to its own update. The guarantee then holds against whoever
    sees single updates, over any exchange, and the sum is the noisier by sqrt(n).

    Args:
        max_norm: Clipping norm C of a party's update, from 2^-64 to 2^64; with ``adaptive`` that of the first
            round.
        noise_multiplier: Noise over clipping norm, z: 50 rounds at epsilon 8 and delta 1e-5 take 4.24 (see
            ``noise_multiplier_for``). 0 clips only, without any guarantee.
        distributed: Whether the parties' noise adds up to that of the guarantee, or each adds all of it.
        colluders: Parties whose own noise is not counted on, with distributed noise.
        adaptive: Lets the clipping norm follow a quantile of the updates' norms.
        delta: Probability that the bound epsilon may fail; well below one over the number of parties.
        max_epsilon: Training ends before a round would exceed this. Default: no limit, it is logged only.
        accountant: "pld", exact, or "rdp", the usual bound by Rényi divergences.

    Raises:
        ValueError: If an argument is out of its range.
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

    @staticmethod
    def clip_factor(norm: float, max_norm: float) -> float:
        """Return what to multiply an update by; see `pellm_lightning.privacy.clipping.clip_factor`."""
        return clip_factor(norm, max_norm)

    def noise_std(self, counting: int, max_norm: float) -> float:
        """Return the standard deviation of the noise that each party adds to its update.

        It belongs to the clipped update; an update that is then multiplied by a share has it multiplied, too.

        Args:
            counting: Number n of parties whose updates are in the sum.
            max_norm: This round's clipping norm C.

        Raises:
            ValueError: If so few parties count that colluders would know all noise.
        """
        multiplier = self.noise_multiplier
        if self.adaptive is not None:
            multiplier = self.adaptive.update_multiplier(multiplier, counting)
        return multiplier * max_norm * self._part(counting)

    def bit_noise_std(self, counting: int) -> float:
        """Return the standard deviation of the noise that each party adds to its bit, +1/2 or -1/2."""
        if self.adaptive is None:
            return 0.0
        return self.adaptive.sum_std(self.noise_multiplier, counting) * self._part(counting)

    def check_counting(self, counting: int) -> None:
        """Check that the counting parties can make the noise.

        Raises:
            ValueError: If so few parties count that colluders would know all noise.
        """
        if counting < 1:
            raise ValueError(f"counting={counting}: noise is shared among at least one party.")
        if self.distributed and self.noise_multiplier > 0 and counting <= self.colluders:
            raise ValueError(
                f"{counting} counting parties cannot hide an update from {self.colluders} colluding ones, who"
                " know all the noise. Lower colluders, raise the number of parties that a round needs, or let"
                " each add all the noise with distributed=False."
            )

    def epsilon(self, accountant: PrivacyAccountant) -> float:
        """Return what the releases in the ledger have cost, at this mechanism's delta."""
        return accountant.epsilon(self.delta, self.accountant)

    def within_budget(self, accountant: PrivacyAccountant) -> bool:
        """Tell whether one more release stays within ``max_epsilon``."""
        if self.max_epsilon is None:
            return True
        return (
            accountant.epsilon_after(self.noise_multiplier, self.delta, self.accountant) <= self.max_epsilon
        )

    def __repr__(self) -> str:
        return (
            f"GaussianMechanism(max_norm={self.max_norm}, noise_multiplier={self.noise_multiplier},"
            f" distributed={self.distributed}, colluders={self.colluders}, adaptive={self.adaptive},"
            f" delta={self.delta}, max_epsilon={self.max_epsilon}, accountant={self.accountant!r})"
        )

    def _part(self, counting: int) -> float:
        """Return one party's noise as a part of what the guarantee needs."""
        self.check_counting(counting)
        if not self.distributed or self.noise_multiplier == 0:
            return 1.0
        return 1 / math.sqrt(counting - self.colluders)


def _check_multiplier(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"noise_multiplier={value!r} must be a number.")
    if not 0 <= value <= MAX_MULTIPLIER:  # nan, too
        raise ValueError(
            f"noise_multiplier={value} must be from 0 to 1e6. noise_multiplier_for(epsilon, delta, rounds) in"
            " pellm_lightning.privacy tells what a budget needs."
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
            " Give a noise multiplier, or leave max_epsilon out to clip only."
        )


def _check_bits(adaptive: AdaptiveClipping | None, noise_multiplier: float) -> None:
    if adaptive is None or adaptive.bit_std is None:
        return
    if 2 * adaptive.bit_std <= noise_multiplier:
        raise ValueError(
            f"bit_std={adaptive.bit_std} of adaptive clipping must be above half the"
            f" noise_multiplier={noise_multiplier}: the bits alone would cost more than a round may."
            " Raise it or leave it out."
        )
