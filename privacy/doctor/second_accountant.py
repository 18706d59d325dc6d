"""Check of the accountant by others: what states ε also chose the noise, so an error in it would prove itself right."""

from __future__ import annotations

import math
import warnings

from opacus.accountants import PRVAccountant
from scipy.stats import norm

from privacy.accounting import rdp_epsilon_of
from privacy.doctor.subject import Subject, Verdict
from privacy.mechanisms import SubsampledGaussian

__all__ = ["accountant_agrees_with_others", "least_epsilon"]

_NAME = "other accountants agree"
_PART = 0.004
_TOLERANCE = 1e-3


def accountant_agrees_with_others(subject: Subject) -> Verdict:
    """The stated ε lies between what two other accountants allow, for the observed steps and for the whole run.

    Below it: Opacus' numerical composition of privacy loss random variables (Gopi, Lee and Wutschitz 2021, arXiv
    2106.02848), less its error, for the same steps without a cap and with continuous noise, which cost less. Above it:
    the Rényi accountant. Neither shares code with the privacy loss distributions that are stated.
    """
    plan = subject.plan
    if plan.delta is None:
        return Verdict(_NAME, None, "nothing is promised")
    promise = subject.promise
    taken = sum(len(observed.steps) for observed in subject.trained)
    whole = promise.local.steps * promise.rounds
    stated = subject.trained[-1].header.privacy
    target = None if promise.privacy.kind == "none" else promise.privacy.target_epsilon
    claims = {taken: math.nan if stated is None else stated.epsilon_run}
    claims[whole] = claims.get(whole, plan.epsilon([plan.whole_run])) if target is None else target
    evidence: list[str] = []
    for steps, epsilon in claims.items():
        mechanism = _mechanism(subject, steps)
        least, most = least_epsilon(mechanism, plan.delta), rdp_epsilon_of([mechanism], plan.delta)
        evidence.append(f"{least:.4f} <= {epsilon:.4f} <= {most:.4f} for {steps} steps")
        # What was aimed at may be missed from below: noise is never below the least that is allowed.
        aimed = target is not None and steps == whole
        if not (least <= epsilon * (1 + _TOLERANCE) and (aimed or epsilon <= most * (1 + _TOLERANCE))):
            return Verdict(_NAME, False, f"ε out of bounds: {evidence[-1]}")
    return Verdict(_NAME, True, f"ε in bounds: {'; '.join(evidence)}")


def least_epsilon(mechanism: SubsampledGaussian, delta: float) -> float:
    """Return an ε that the mechanism costs at least, cut or not; 0 where none could be worked out."""
    rate, noise, steps = mechanism.sampling_rate, mechanism.noise_multiplier, mechanism.steps
    if rate == 1:
        return _of_one_gaussian(noise / math.sqrt(steps), delta)
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps)]
    rough = rdp_epsilon_of([mechanism.repeated(steps)], delta)
    error = max(_PART * rough, 1e-3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            upper = float(accountant.get_epsilon(delta, eps_error=error))
    except (RuntimeError, ValueError, MemoryError):  # losses too large, or δ too small, for its grid
        return 0.0
    return max(0.0, upper - 2 * error)


def _of_one_gaussian(noise: float, delta: float) -> float:
    """Return ε of one Gaussian release, by bisection of δ(ε) (Balle and Wang 2018, arXiv 1805.06530, Theorem 8)."""

    def exceeded(epsilon: float) -> bool:
        signal = 1 / noise
        tail = float(norm.logcdf(-signal / 2 - epsilon / signal))
        return float(norm.cdf(signal / 2 - epsilon / signal)) - math.exp(min(epsilon + tail, 0.0)) > delta

    low, high = 0.0, 1.0
    while exceeded(high):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeded(middle) else (low, middle)
    return low


def _mechanism(subject: Subject, steps: int) -> SubsampledGaussian:
    """Return what `steps` steps amount to, from what was asked for; the noise's size is checked on silenced rounds."""
    plan, promise = subject.plan, subject.promise
    noise = plan.noise_multiplier
    if plan.loss is not None:
        noise = (noise**-2 + plan.loss.noise_multiplier**-2) ** -0.5
    rate = promise.expected_batch / promise.published_units
    return SubsampledGaussian(rate, noise, steps, plan.sampling.truncation, plan.discrete)
