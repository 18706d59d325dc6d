"""How much noise a promise needs."""

from __future__ import annotations

import math
from functools import lru_cache

from scipy.optimize import root_scalar

from privacy.accounting import COARSEST_GRID, SubsampledGaussian, epsilon_of, epsilon_on_grid
from protocol.errors import PrivacyError

__all__ = ["calibrate_noise"]

_LEAST, _MOST = 0.2, 1000.0
_PRECISION = 1e-3


@lru_cache(maxsize=256)
def calibrate_noise(target_epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the smallest noise multiplier (within 0.1 % of ε) whose `steps` steps cost at most `target_epsilon`.

    Raises:
        PrivacyError: when even a noise multiplier of 1000 costs more.
    """

    def excess(log_noise: float) -> float:
        return math.log(_coarse_cost(math.exp(log_noise), sampling_rate, steps, delta) / target_epsilon)

    if excess(math.log(_LEAST)) <= 0:
        return _LEAST
    if excess(math.log(_MOST)) > 0:
        raise PrivacyError(
            f"target_epsilon={target_epsilon} at delta={delta} is too small for {steps} steps at sampling rate "
            f"{sampling_rate:.4g}: even a noise multiplier of {_MOST:g} costs more; ask for a larger ε or fewer steps"
        )
    # ln ε is nearly linear in ln σ, so a bracketing secant method needs few of the expensive evaluations.
    bracket = (math.log(_LEAST), math.log(_MOST))
    noise = math.exp(root_scalar(excess, method="brentq", bracket=bracket, xtol=_PRECISION / 10).root)
    # The root was found on the coarse grid; the promise is checked on the grid that the accountant uses.
    while epsilon_of([SubsampledGaussian(sampling_rate, noise, steps)], delta) > target_epsilon:
        noise *= 1 + _PRECISION / 10
    return noise


def _coarse_cost(noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> float:
    mechanism = SubsampledGaussian(sampling_rate, noise_multiplier, steps)
    # Far too much noise costs 0 exactly; the logarithm needs a floor.
    return max(epsilon_on_grid((mechanism,), delta, COARSEST_GRID), 1e-9)
