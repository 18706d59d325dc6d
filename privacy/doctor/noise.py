"""Checks of the noise, on rounds in which it is all there is: the network is silenced, so every gradient is zero.

The silenced rounds draw real batches, so noise that depends on the drawn batch shows too; the starved ones draw nearly
nothing, at a site that holds far less than it publishes, so noise that depends on its true count shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from scipy import special, stats

from privacy.doctor.subject import FALSE_ALARM, Subject, Verdict

__all__ = [
    "distance_to_normal",
    "noise_does_not_depend_on_the_sum",
    "noise_has_the_calibrated_deviation",
    "noise_is_fresh_and_normal",
    "two_sided_chi_square",
]

_DEVIATION = "noise has the calibrated standard deviation"
_FRESH = "noise is Gaussian, and fresh in every step"
_SUM = "noise does not depend on the sum"


def noise_has_the_calibrated_deviation(subject: Subject) -> Verdict:
    """Σz² of each tensor in each step is χ²-distributed; two-sided, Bonferroni over all of them."""
    if not subject.plan.is_private:
        return Verdict(_DEVIATION, None, "no noise is promised")
    steps = list(_standardized(subject))
    tensors = [(step, position, z) for step, parts in enumerate(steps) for position, z in enumerate(parts)]
    tests = [two_sided_chi_square(z) for _, _, z in tensors]
    # All of a tensor's steps, and everything together, are tested as well: a small deviation needs many values.
    pooled = [torch.cat(parts) for parts in zip(*steps, strict=True)]
    everything = torch.cat(pooled)
    tests += [two_sided_chi_square(z) for z in (*pooled, everything)]
    least = min(tests)
    ratio = float(everything.square().mean().sqrt())
    evidence = (
        f"{ratio:.4f} x the promised σ·C over {len(everything)} values, smallest p {least:.1e} of {len(tests)} "
        f"χ² tests (error rate {FALSE_ALARM:g})"
    )
    if least >= FALSE_ALARM / len(tests):
        return Verdict(_DEVIATION, True, evidence)
    worst = tests.index(least)
    if worst < len(tensors):
        step, position, z = tensors[worst]
        evidence += f"; tensor {position} in step {step + 1} has {float(z.square().mean().sqrt()):.4f} x"
    return Verdict(_DEVIATION, False, evidence)


def noise_is_fresh_and_normal(subject: Subject) -> Verdict:
    """No two steps share noise (correlations), and its distribution is normal (Dvoretzky-Kiefer-Wolfowitz bound)."""
    if not subject.plan.is_private:
        return Verdict(_FRESH, None, "no noise is promised")
    steps = torch.stack([torch.cat(parts) for parts in _standardized(subject)])
    unit = steps / steps.norm(dim=1, keepdim=True).clamp(min=1e-300)
    pairs = torch.triu_indices(len(steps), len(steps), offset=1)
    correlations = (unit @ unit.T)[pairs[0], pairs[1]].abs()
    most = float(correlations.max()) if len(correlations) else 0.0
    # Two independent Gaussian directions in d dimensions have correlation N(0, 1/d), nearly.
    bound = float(stats.norm.isf(FALSE_ALARM / 4 / max(len(correlations), 1))) / math.sqrt(steps.shape[1])
    distance, allowed = distance_to_normal(steps.flatten())
    evidence = (
        f"largest correlation of two steps {most:.4f} (at most {bound:.4f}); distance to a normal distribution "
        f"{distance:.5f} (at most {allowed:.5f}; error rate {FALSE_ALARM:g})"
    )
    return Verdict(_FRESH, most <= bound and distance <= allowed, evidence)


def noise_does_not_depend_on_the_sum(subject: Subject) -> Verdict:
    """With units in it, what was added to their sum has the promised size: nothing is scaled by the un-noised norm.

    The same few units with noise and without; their sum is several clip norms long. Σz² is χ²-distributed.
    """
    probe, plan = subject.probe, subject.plan
    if probe.noised is None:
        return Verdict(_SUM, None, "no noise is promised")
    added = (probe.noised - probe.whole) * probe.normalizer / (plan.noise_multiplier * probe.clip_norm)
    chance = two_sided_chi_square(added)
    length = float(probe.whole.norm()) * probe.normalizer / probe.clip_norm
    evidence = (
        f"{float(added.square().mean().sqrt()):.4f} x the promised σ·C on a sum of {length:.2f} clip norms, "
        f"p {chance:.1e} (error rate {FALSE_ALARM:g})"
    )
    return Verdict(_SUM, chance >= FALSE_ALARM, evidence)


def _standardized(subject: Subject) -> Iterator[list[torch.Tensor]]:
    """Yield each gradient that is all noise, in units of the promised noise: standard normal, if that is kept."""
    plan = subject.plan
    promised = plan.noise_multiplier * plan.clip_norm / subject.promise.expected_batch
    for observed in subject.noise_alone:
        for step in observed.steps:
            yield [part / promised for part in step.gradient]


def two_sided_chi_square(z: torch.Tensor) -> float:
    """Return the two-sided p-value of Σz², z being standard normal."""
    statistic, n = float(z.square().sum()), z.numel()
    return min(1.0, 2 * min(float(special.chdtr(n, statistic)), float(special.chdtrc(n, statistic))))


def distance_to_normal(z: torch.Tensor) -> tuple[float, float]:
    """Return sup |F̂ - Φ|, and what it may be: Massart 1990, P(sup > t) ≤ 2 exp(-2 n t²), for any n."""
    n = z.numel()
    normal = special.ndtr(z.sort().values.numpy())
    ranks = torch.arange(n + 1, dtype=torch.float64).numpy() / n
    distance = max(float(abs(ranks[1:] - normal).max()), float(abs(ranks[:-1] - normal).max()))
    return distance, math.sqrt(math.log(4 / FALSE_ALARM) / (2 * n))
