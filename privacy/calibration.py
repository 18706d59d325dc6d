"""How much noise a promise needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache

from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from scipy.optimize import root_scalar

from privacy.accounting import ACCOUNTANT, accountant_of, epsilon_of
from privacy.loss_distributions import epsilon_on_grid, pld_epsilon
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import PrivacyError

__all__ = ["calibrate_noise", "is_reachable"]

_LEAST, _MOST = 0.2, 1000.0
_LOWEST, _AIM, _HIGHEST = 0.999, 0.9993, 0.9996
"""What part of the target may be reached. The rest is for the grid: ε of a part of the run may be discretized a little
more coarsely than ε of the whole, by 0.03 %, and a ledger whose budget is the target must let every part pass."""

_STRIDE, _SLOPE_STRIDE = 1.25, 1.1
_USUAL_SLOPE = -1.5
_SEARCH_GRID, _SEARCHED_FROM = 1e-2, 0.5
"""One coarse grid, and the ε from which a search on it pays; a smaller one it overstates so much that it misleads."""
_SEARCH_TOLERANCE = 0.05
"""Between grids, for a smaller ε."""


def is_reachable(target_epsilon: float, delta: float, mechanism: SubsampledGaussian) -> bool:
    """Return whether `calibrate_noise` finds noise for a target: whether the most noise costs no more."""
    return epsilon_of([replace(mechanism, noise_multiplier=_MOST)], delta) <= _AIM * target_epsilon


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

    if not is_reachable(target_epsilon, delta, mechanism):
        raise PrivacyError(
            f"target_epsilon={target_epsilon} at delta={delta} is too small for {mechanism.steps} steps at sampling "
            f"rate {mechanism.sampling_rate:.4g}: even a noise multiplier of {_MOST:g} costs more; ask for a larger ε "
            "or fewer steps"
        )
    aim, start = _AIM * target_epsilon, _central_limit(target_epsilon, delta, mechanism)
    coarse = accountant_of([mechanism]) == ACCOUNTANT
    cost = _searched(mechanism, delta, aim) if coarse else stated
    bracket = _bracket(cost, aim, start)
    if bracket is None:  # a coarse grid overstates an ε next to what the most noise reaches
        cost, bracket = stated, (_LEAST, _MOST)
    low, high = bracket
    if low == high:
        return _LEAST
    if cost is not stated:
        near = _root(cost, low, high, aim)
        return _refined(stated, near, target_epsilon, _slope(cost, near))
    return _refined(stated, math.sqrt(low * high), target_epsilon, _USUAL_SLOPE, low, high)


def _central_limit(target_epsilon: float, delta: float, mechanism: SubsampledGaussian) -> float:
    """Return about the noise that is needed, to start a search from.

    Many sampled steps are nearly one Gaussian of μ = q √(T (exp(1/σ²) - 1)) (Bu et al. 2020, arXiv 1911.11607): a good
    guess and no bound. Nothing is stated by it.
    """
    needed = root_scalar(
        lambda log_mu: get_epsilon_gaussian(math.exp(-log_mu), delta) - target_epsilon,
        bracket=(math.log(1e-7), math.log(1e3)),
        xtol=1e-3,
    )
    signal = (math.exp(needed.root) / mechanism.sampling_rate) ** 2 / max(mechanism.steps, 1)
    return min(max(math.log1p(signal) ** -0.5, _LEAST), _MOST)


def _searched(mechanism: SubsampledGaussian, delta: float, aim: float) -> Callable[[float], float]:
    """Return ε as a function of the noise: quick, a few percent too large, remembered."""

    @cache
    def cost(noise: float) -> float:
        noised = (replace(mechanism, noise_multiplier=noise),)
        if aim >= _SEARCHED_FROM:
            return epsilon_on_grid(noised, delta, _SEARCH_GRID)
        return pld_epsilon(noised, delta, tolerance=_SEARCH_TOLERANCE)

    return cost


def _slope(cost: Callable[[float], float], noise: float) -> float:
    """Return d ln ε / d ln σ, about: -1.5 at usual rates, far steeper where steps are few and rarely drawn."""
    fewer, more = noise / _SLOPE_STRIDE, noise * _SLOPE_STRIDE
    measured = math.log(max(cost(more), 1e-12) / max(cost(fewer), 1e-12)) / math.log(more / fewer)
    return measured if _is_slope(measured) else _USUAL_SLOPE


def _is_slope(measured: float) -> bool:
    return -20 < measured < -0.5


def _bracket(cost: Callable[[float], float], aim: float, start: float) -> tuple[float, float] | None:
    """Return two noise multipliers with the answer between them; the least one twice where it is enough; else None.

    Walks from `start`: an evaluation costs about 1/σ², so the least noise is looked at only when nothing else is left.
    """
    low = high = start
    while cost(high) > aim:
        if high == _MOST:
            return None
        low, high = high, min(high * _STRIDE, _MOST)
    if low < high:
        return low, high
    while low > _LEAST and cost(low) <= aim:
        low, high = max(low / _STRIDE, _LEAST), low
    if low > _LEAST:
        return low, high
    return (_LEAST, _LEAST) if cost(_LEAST) <= aim else (_LEAST, high)


def _root(cost: Callable[[float], float], low: float, high: float, aim: float) -> float:
    """Return about the noise at which `cost` is the aim: ln ε is nearly linear in ln σ."""

    def excess(log_noise: float) -> float:
        # Far too much noise costs 0 exactly; the logarithm needs a floor.
        return math.log(max(cost(math.exp(log_noise)), 1e-12) / aim)

    return math.exp(root_scalar(excess, method="brentq", bracket=(math.log(low), math.log(high)), xtol=1e-3).root)


def _refined(
    stated: Callable[[float], float],
    noise: float,
    target_epsilon: float,
    slope: float,
    too_little: float = _LEAST,
    enough: float = 2 * _MOST,
) -> float:
    """Return noise near `noise` whose stated ε lies in the accepted part of the target.

    Secant steps in (ln σ, ln ε), kept between the most noise known to be too little and the least known to be enough.
    """
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
        slope = measured if _is_slope(measured) else slope
        noise, height = following, risen
    return noise
