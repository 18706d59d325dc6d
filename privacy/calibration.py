"""How much noise a promise needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from scipy.optimize import root_scalar

from privacy.accounting import COARSEST_GRID, epsilon_of, epsilon_on_grid, grid_of
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import PrivacyError

__all__ = ["calibrate_noise"]

_LEAST, _MOST = 0.2, 1000.0
_PRECISION = 1e-3
_STRIDE = 1.6
_SEARCH_GRID = 10 * COARSEST_GRID


@lru_cache(maxsize=256)
def calibrate_noise(target_epsilon: float, delta: float, mechanism: SubsampledGaussian) -> float:
    """Return the smallest noise multiplier at which `mechanism` costs at most `target_epsilon`; never below 0.2.

    The noise multiplier that `mechanism` comes with is not used.

    The ε reached is within 0.1 % of the target, or 0.5 % where the accountant's grid changes close by.

    Raises:
        PrivacyError: when even a noise multiplier of 1000 costs more.
    """
    sampling_rate, steps = mechanism.sampling_rate, mechanism.steps

    def cost(noise: float, grid: float) -> float:
        # Far too much noise costs 0 exactly; the logarithms below need a floor.
        return max(epsilon_on_grid((SubsampledGaussian(sampling_rate, noise, steps),), delta, grid), 1e-9)

    grid, bracket = _SEARCH_GRID, _bracket(lambda noise: cost(noise, _SEARCH_GRID), target_epsilon)
    if bracket is None:  # a coarse grid overstates a small ε; ask a finer one before giving up
        grid, bracket = COARSEST_GRID, _bracket(lambda noise: cost(noise, COARSEST_GRID), target_epsilon)
    if bracket is None:
        raise PrivacyError(
            f"target_epsilon={target_epsilon} at delta={delta} is too small for {steps} steps at sampling rate "
            f"{sampling_rate:.4g}: even a noise multiplier of {_MOST:g} costs more; ask for a larger ε or fewer steps"
        )
    low, high = bracket
    if low == high:
        return _LEAST

    aim = target_epsilon * (1 - _PRECISION / 3)  # a little below, so that the next finer grid seldom says "too much"

    def root(low: float, high: float, grid: float) -> float:
        # ln ε is nearly linear in ln σ, so a bracketing secant method needs few of the expensive evaluations.
        def excess(log_noise: float) -> float:
            return math.log(cost(math.exp(log_noise), grid) / aim)

        bracket = (math.log(low), math.log(high))
        return math.exp(root_scalar(excess, method="brentq", bracket=bracket, xtol=_PRECISION / 10).root)

    noise = root(low, high, grid)
    # A coarse grid overstates ε, sometimes several times: search again on the grid that the accountant will use.
    while (finer := grid_of((SubsampledGaussian(sampling_rate, noise, steps),), delta)) < grid:
        grid, low = finer, noise
        if target_epsilon * (1 - _PRECISION) <= cost(noise, grid) <= target_epsilon:
            break
        # ε falls at least as fast as 1/σ, so this leads below the root in one step, or nearly.
        while (reached := cost(low, grid)) <= target_epsilon:
            low *= min(reached / target_epsilon, 1 - _PRECISION)
        noise = root(low, noise * (1 + _PRECISION), grid)
    while (reached := _booked(noise, sampling_rate, steps, delta)) > target_epsilon:
        noise *= max((reached / target_epsilon) ** 0.125, 1 + _PRECISION / 10)
    return noise


def _bracket(cost: Callable[[float], float], target_epsilon: float) -> tuple[float, float] | None:
    """Return two noise multipliers with the answer between them; the least one twice where it is enough; else None.

    Walks from 1: an evaluation costs about 1/σ², so the least noise is looked at only when nothing else is left.
    """
    high = 1.0
    while cost(high) > target_epsilon:
        high *= _STRIDE
        if high > _MOST:
            return None
    low = high / _STRIDE
    while low > _LEAST and cost(low) <= target_epsilon:
        low, high = low / _STRIDE, low
    if low > _LEAST:
        return low, high
    return (_LEAST, _LEAST) if cost(_LEAST) <= target_epsilon else (_LEAST, high)


def _booked(noise: float, sampling_rate: float, steps: int, delta: float) -> float:
    """Return the most that the accountant ever states while `steps` steps are executed.

    The accountant's grid changes where the steps pass a power of two, and its ε may fall by a fraction of a percent
    there: a ledger whose budget is the target must not refuse a run halfway for that.
    """
    before = 1 << max(steps - 1, 1).bit_length() - 1
    return max(epsilon_of([SubsampledGaussian(sampling_rate, noise, count)], delta) for count in (steps, before))
