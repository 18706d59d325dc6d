"""How much noise a promise needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from scipy.optimize import root_scalar

from privacy.accounting import ACCOUNTANT, accountant_of, epsilon_of
from privacy.loss_distributions import foretold_epsilon
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import PrivacyError

__all__ = ["calibrate_noise", "is_reachable"]

_LEAST, _MOST = 0.2, 1000.0
_LOWEST, _AIM, _HIGHEST = 0.999, 0.9993, 0.9996
"""What part of the target may be reached. The rest is for the grid: ε of a part of the run may be discretized a little
more coarsely than ε of the whole, by 0.03 %, and a ledger whose budget is the target must let every part pass."""

_USUAL_SLOPE = -1.5
"""Of ln ε in ln σ, at usual rates; far steeper where steps are few and rarely drawn."""
_STRIDE = 0.35
"""At most, in ln σ: far from the answer a slope says little."""
_SECANTS = 16
"""After which a search halves its bracket instead: on a plateau of ε secants are minute."""
_STAGES = ((0.05, 0.02), (0.01, 2e-4))
"""How closely ε is foretold, and how near to the aim: first for a rough search, then for one that hardly ever has to be
mended by the ε that is stated, which takes much longer."""


def is_reachable(target_epsilon: float, delta: float, mechanism: SubsampledGaussian) -> bool:
    """Return whether `calibrate_noise` finds noise for a target: whether the most noise costs no more."""
    return epsilon_of([replace(mechanism, noise_multiplier=_MOST)], delta) <= _AIM * target_epsilon


@lru_cache(maxsize=256)
def calibrate_noise(target_epsilon: float, delta: float, mechanism: SubsampledGaussian) -> float:
    """Return the smallest noise multiplier at which `mechanism` costs at most `target_epsilon`; never below 0.2.

    The noise multiplier that `mechanism` comes with is not used; its steps, rate, cut and kind of noise are. The ε
    reached lies within 0.1 % below the target, unless 0.2 is enough or ε leaps over that part.

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
    aim = _AIM * target_epsilon
    noise, slope = _central_limit(target_epsilon, delta, mechanism), _USUAL_SLOPE
    if accountant_of([mechanism]) == ACCOUNTANT:
        for tolerance, near in _STAGES:

            def foretold(noise: float, tolerance: float = tolerance) -> float:
                return foretold_epsilon((replace(mechanism, noise_multiplier=noise),), delta, tolerance)

            noise, slope = _solved(foretold, noise, slope, (1 - near) * aim, aim, (1 + near) * aim)
    return _solved(stated, noise, slope, _LOWEST * target_epsilon, aim, _HIGHEST * target_epsilon)[0]


def _central_limit(target_epsilon: float, delta: float, mechanism: SubsampledGaussian) -> float:
    """Return about the noise that is needed, to start a search from.

    Many sampled steps are nearly one Gaussian of μ = q √(T (exp(1/σ²) - 1)) (Bu et al. 2020, arXiv 1911.11607): a good
    guess and no bound. Nothing is stated by it.
    """

    def excess(log_mu: float) -> float:
        return get_epsilon_gaussian(math.exp(-log_mu), delta) - target_epsilon

    low, high = math.log(1e-7), math.log(1e3)
    if excess(low) >= 0:
        needed = low
    elif excess(high) <= 0:
        needed = high
    else:
        needed = root_scalar(excess, bracket=(low, high), xtol=1e-3).root
    signal = (math.exp(needed) / mechanism.sampling_rate) ** 2 / max(mechanism.steps, 1)
    return min(max(math.log1p(signal) ** -0.5, _LEAST), _MOST)


def _solved(
    cost: Callable[[float], float], noise: float, slope: float, lowest: float, aim: float, highest: float
) -> tuple[float, float]:
    """Return noise near `noise` whose cost lies between `lowest` and `highest`, and d ln ε / d ln σ there.

    Secant steps in (ln σ, ln ε), which is nearly a line, kept between the most noise known to be too little and the
    least known to be enough. The least noise is returned where it is enough, the most where nothing is.
    """
    too_little, enough = 0.0, math.inf
    before: tuple[float, float] | None = None
    evaluations = 0
    while True:
        evaluations += 1
        height = max(cost(noise), 1e-12)  # far too much noise costs 0 exactly
        if before is not None:
            measured = math.log(height / before[1]) / math.log(noise / before[0])
            slope = measured if -20 < measured < -0.5 else slope
        if lowest <= height <= highest or noise == (_LEAST if height < lowest else _MOST):
            return noise, slope
        if height > highest:
            too_little = noise
        else:
            enough = noise
        if enough <= too_little * (1 + 1e-9):  # ε leaps over the accepted part: stay on the safe side of the leap
            return enough, slope
        before = noise, height
        if evaluations > _SECANTS:
            noise = _MOST if enough == math.inf else _LEAST if too_little == 0 else math.sqrt(too_little * enough)
            continue
        stride = math.exp(max(-_STRIDE, min((math.log(aim) - math.log(height)) / slope, _STRIDE)))
        step = min(max(noise * stride, _LEAST), _MOST)
        noise = step if too_little < step < enough else math.sqrt(too_little * enough)
