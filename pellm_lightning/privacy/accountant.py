"""Privacy accountant: epsilon of the composition of Gaussian mechanisms."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np

Accountant: TypeAlias = Literal["pld", "rdp"]
ACCOUNTANTS = ("pld", "rdp")
MAX_MULTIPLIER = 1e6
"""Largest noise multiplier; no budget needs as much."""


class PrivacyAccountant:
    """Accountant of a federation's releases and of the (epsilon, delta) that they compose to.

    A release is one Gaussian mechanism with the noise multiplier z = standard deviation / sensitivity, and
    every party's data is in every release: no amplification by sampling is claimed. T such releases are
    together exactly one Gaussian mechanism, of multiplier 1 / sqrt(sum 1 / z_t^2) (Dong, Roth and Su 2019,
    arXiv:1905.02383, corollary 3.3), which dp-accounting is asked about:
    test_equals_dp_accounting_release_by_release.

    Example:
        >>> accountant = PrivacyAccountant()
        >>> for _ in range(10):
        ...     accountant.release(noise_multiplier=10.0)
        >>> round(accountant.epsilon(delta=1e-5), 2)
        1.2
    """

    def __init__(self) -> None:
        self._runs: list[tuple[float, int]] = []

    @property
    def releases(self) -> int:
        """Number of releases so far."""
        return sum(count for _, count in self._runs)

    def release(self, noise_multiplier: float) -> None:
        """Record one more release.

        Args:
            noise_multiplier: Standard deviation of its noise over its sensitivity; 0 for one without noise.

        Raises:
            ValueError: If the multiplier is not a number from 0 to 1e6.
        """
        self._record(_multiplier(noise_multiplier), 1)

    def epsilon(self, delta: float, accountant: Accountant = "pld") -> float:
        """Return the epsilon of all releases together; 0 before the first, infinite if one had no noise.

        Args:
            delta: Probability that the bound may fail, above 0 and below 1.
            accountant: "pld" is exact here: a Gaussian's privacy loss distribution in closed form (Balle and
                Wang 2018, arXiv:1805.06530). "rdp" is the bound by Rényi divergences, about 7 % above it.

        Raises:
            ValueError: If an argument is out of its range.
            ImportError: If dp-accounting is not installed.
        """
        return gaussian_epsilon(self._combined(), delta, accountant)

    def epsilon_after(
        self, noise_multiplier: float, delta: float, accountant: Accountant = "pld", releases: int = 1
    ) -> float:
        """Return the epsilon as it would be after so many more releases with this multiplier."""
        after = PrivacyAccountant()
        after._runs = [*self._runs, (_multiplier(noise_multiplier), releases)]
        return after.epsilon(delta, accountant)

    def state_dict(self) -> dict[str, Any]:
        """Return the releases as plain JSON: ``{"releases": [[noise_multiplier, count], ...]}``, in order."""
        return {"releases": [list(run) for run in self._runs]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the releases of ``state_dict``; nothing changes if they are invalid.

        Raises:
            ValueError: If the state is invalid. It may come from a peer.
        """
        loaded = PrivacyAccountant()
        runs = state_dict.get("releases") if isinstance(state_dict, Mapping) else None
        if not isinstance(runs, list):
            raise ValueError(
                f"An accountant's state must hold a list under 'releases', not {_short(state_dict)}."
            )
        for run in runs:
            if not isinstance(run, list | tuple) or len(run) != 2:
                raise ValueError(
                    f"An accountant's entry must be [noise_multiplier, count], not {_short(run)}."
                )
            multiplier, count = run
            if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < 2**53:
                raise ValueError(
                    f"An accountant's count must be an integer from 1 to 2^53, not {_short(count)}."
                )
            loaded._record(_multiplier(multiplier), count)
        self._runs = loaded._runs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrivacyAccountant) and self._runs == other._runs

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"PrivacyAccountant({self._runs})"

    def _record(self, multiplier: float, count: int) -> None:
        if self._runs and self._runs[-1][0] == multiplier:
            count += self._runs.pop()[1]
        self._runs.append((multiplier, count))

    def _combined(self) -> float:
        """Return the multiplier of one release that is equivalent to all."""
        if any(multiplier == 0 for multiplier, _ in self._runs):
            return 0.0
        # Like hypot, it neither overflows nor underflows on the way.
        rate = math.hypot(*(math.sqrt(count) / multiplier for multiplier, count in self._runs))
        return math.inf if rate == 0 else 1 / rate


def noise_multiplier_for(epsilon: float, delta: float, rounds: int, accountant: Accountant = "pld") -> float:
    """Return the least noise multiplier z with which ``rounds`` releases cost no more than ``epsilon``.

    Args:
        epsilon: Privacy budget of all rounds together, above 0.
        delta: Probability that the bound may fail, above 0 and below 1.
        rounds: Number of releases, all parties in each.
        accountant: As in ``PrivacyAccountant.epsilon``.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon={epsilon} must be a finite number above 0.")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds={rounds!r} must be an integer above 0.")
    low, high = 0.0, 1.0
    while gaussian_epsilon(high, delta, accountant) > epsilon:
        low, high = high, 2 * high
        if high > MAX_MULTIPLIER:
            raise ValueError(
                f"epsilon={epsilon} at delta={delta} needs more noise than any model could be trained with."
            )
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if gaussian_epsilon(middle, delta, accountant) > epsilon:
            low = middle
        else:
            high = middle
    return high * math.sqrt(rounds)


def gaussian_epsilon(noise_multiplier: float, delta: float, accountant: Accountant) -> float:
    """Return the epsilon of one Gaussian mechanism; see ``PrivacyAccountant.epsilon``."""
    check_delta(delta)
    check_accountant(accountant)
    if noise_multiplier == math.inf:
        return 0.0
    if noise_multiplier < 1e-6:  # epsilon above 10^11, where the search for it no longer ends well
        return math.inf
    dp = dp_accounting()
    if accountant == "pld":
        with np.errstate(divide="ignore"):  # it takes the logarithm of 0 where epsilon nears 0
            return float(dp.get_epsilon_gaussian(noise_multiplier, delta))
    spent = dp.rdp.RdpAccountant().compose(dp.GaussianDpEvent(noise_multiplier))
    return float(spent.get_epsilon(delta))


def dp_accounting() -> Any:
    """Import dp-accounting, an optional dependency."""
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise ImportError(
            'Accounting for privacy needs the package dp-accounting: pip install "pellm-lightning[privacy]".'
        ) from error
    return dp_accounting


@contextmanager
def root_logger_kept() -> Iterator[None]:
    """Restore the root logger: handlers that libraries add to it would print every line twice."""
    handlers, level = list(logging.root.handlers), logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:], logging.root.level = handlers, level


def check_delta(delta: float) -> None:
    """Validate an argument of that name."""
    if not _is_number(delta) or not 0 < delta < 1:
        raise ValueError(
            f"delta={delta!r} must be above 0 and below 1, well below one over the number of those protected."
        )


def check_accountant(accountant: str) -> None:
    """Validate an argument of that name."""
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant={accountant!r} must be one of {', '.join(map(repr, ACCOUNTANTS))}.")


def _multiplier(value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= MAX_MULTIPLIER:  # rejects nan
        raise ValueError(f"A noise multiplier must be a number from 0 to 1e6, not {_short(value)}.")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
