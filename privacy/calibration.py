"""How much noise a promise needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from scipy.optimize import root_scalar

from privacy.accounting import ACCOUNTANT, accountant_of, epsilon_of
from privacy.loss_distributions import epsilon_on_grid
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import PrivacyError

__all__ = ["calibrate_noise"]

_LEAST, _MOST = 0.2, 1000.0
_LOWEST, _AIM, _HIGHEST = 0.999, 0.9993, 0.9996
"""What part of the target may be reached. The rest is for the grid: ε of a part of the run may be discretized a little
more coarsely than ε of the whole, by 0.03 %, and a ledger whose budget is the target must let every part pass."""

_STRIDE = 1.6
_SEARCH_GRID = 1e-2


@lru_cache(maxsize=256)
def calibrate_noise(target_epsilon: float, delta: float, mechanism: SubsampledGaussian) -> float:
    """Return the smallest noise multiplier at which `mechanism` costs at most `target_epsilon`; never below 0.2.

    The noise multiplier that `mechanism` comes with is not used; its steps, rate, cut and kind of noise are. The ε
    reached lies within 0.1 % below the target, unless 0.2 is enough.

    Raises:
        PrivacyError: when even a noise multiplier of 1000 costs more.
    """

    def stated(noise: float) -> float:
        return epsilon_of([replace(mechanism, noise_multiplier=noise)], delta)

    cost = _on_search_grid(mechanism, delta) if accountant_of([mechanism]) == ACCOUNTANT else stated
    aim = _AIM * target_epsilon
    bracket = _bracket(cost, aim)
    if bracket is None and cost is not stated:  # a coarse grid overstates a small ε; ask a finer one before giving up
        cost, bracket = stated, _bracket(stated, aim)
    if bracket is None:
        raise PrivacyError(
            f"target_epsilon={target_epsilon} at delta={delta} is too small for {mechanism.steps} steps at sampling "
            f"rate {mechanism.sampling_rate:.4g}: even a noise multiplier of {_MOST:g} costs more; ask for a larger ε "
            "or fewer steps"
        )
    low, high = bracket
    if low == high:
        return _LEAST
    return _refined(stated, _root(cost, low, high, aim), target_epsilon)


def _on_search_grid(mechanism: SubsampledGaussian, delta: float) -> Callable[[float], float]:
    def cost(noise: float) -> float:
        return epsilon_on_grid((replace(mechanism, noise_multiplier=noise),), delta, _SEARCH_GRID)

    return cost


def _bracket(cost: Callable[[float], float], aim: float) -> tuple[float, float] | None:
    """Return two noise multipliers with the answer between them; the least one twice where it is enough; else None.

    Walks from 1: an evaluation costs about 1/σ², so the least noise is looked at only when nothing else is left.
    """
    high = 1.0
    while cost(high) > aim:
        if high == _MOST:
            return None
        high = min(high * _STRIDE, _MOST)
    low = high / _STRIDE
    while low > _LEAST and cost(low) <= aim:
        low, high = low / _STRIDE, low
    if low > _LEAST:
        return low, high
    return (_LEAST, _LEAST) if cost(_LEAST) <= aim else (_LEAST, high)


def _root(cost: Callable[[float], float], low: float, high: float, aim: float) -> float:
    """Return about the noise at which `cost` is the aim: ln ε is nearly linear in ln σ."""

    def excess(log_noise: float) -> float:
        # Far too much noise costs 0 exactly; the logarithm needs a floor.
        return math.log(max(cost(math.exp(log_noise)), 1e-12) / aim)

    return math.exp(root_scalar(excess, method="brentq", bracket=(math.log(low), math.log(high)), xtol=1e-4).root)


def _refined(stated: Callable[[float], float], noise: float, target_epsilon: float) -> float:
    """Return noise near `noise` whose stated ε lies in the accepted part of the target.

    Secant steps in (ln σ, ln ε), kept between the most noise known to be too little and the least known to be enough.
    """
    too_little, enough, slope = _LEAST, 2 * _MOST, -1.5
    goal = math.log(_AIM * target_epsilon)
    height = math.log(max(stated(noise), 1e-12))
    while not math.log(_LOWEST * target_epsilon) <= height <= math.log(_HIGHEST * target_epsilon):
        if height > goal:
            too_little = noise
        else:
            enough = noise
        if enough <= too_little * (1 + 1e-9):  # ε leaps over the accepted part: stay on the safe side of the leap
            return enough
        step = noise * math.exp((goal - height) / slope)
        following = step if too_little < step < enough else math.sqrt(too_little * enough)
        risen = math.log(max(stated(following), 1e-12))
        measured = (risen - height) / math.log(following / noise)
        slope = measured if -20 < measured < -0.5 else slope
        noise, height = following, risen
    return noise
