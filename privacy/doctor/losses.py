"""Check of the released training loss: bounded per unit, with the noise that its plan states."""

from __future__ import annotations

import math

import torch
from scipy import stats

from privacy.doctor.noise import distance_to_normal, two_sided_chi_square
from privacy.doctor.subject import FALSE_ALARM, ObservedRound, Subject, Verdict

__all__ = ["released_loss_is_noised"]

_NAME = "the released loss is bounded and noised"
_METRIC = "noisy_training_loss"
_SHARE = FALSE_ALARM / 3
"""Three tests share the error rate; the distance to a normal distribution is held to a fifth of it by itself."""


def released_loss_is_noised(subject: Subject) -> Verdict:
    """In empty steps, and where no loss is finite, what is released is noise of the promised size; where every loss is
    huge, it is at most the bound times the units, and noise.

    The first on some hundred steps of the rule (χ², and the distance to a normal distribution), the others on replies,
    each of which holds one value: noise that is missing shows there, noise that is a little small does not.
    """
    release = subject.plan.loss
    if release is None:
        return Verdict(_NAME, None, "no loss is released")
    deviation = release.noise_multiplier * release.clip
    values = torch.from_numpy(subject.losses) / deviation
    ratio, chance = float(values.square().mean().sqrt()), two_sided_chi_square(values)
    distance, allowed = distance_to_normal(values)
    evidence = (
        f"{ratio:.3f} x the promised noise in {len(values)} empty steps, p {chance:.1e} (error rate {FALSE_ALARM:g})"
    )
    if chance < _SHARE or distance > allowed:
        return Verdict(_NAME, False, f"{evidence}; distance to a normal distribution {distance:.4f}")
    loud, unfinite = subject.silenced
    replies = [unfinite, subject.starved.first, subject.starved.elsewhere, subject.starved.twin]
    told = [_total(subject, each) for each in (loud, *replies)]
    if not all(map(math.isfinite, told)):
        return Verdict(_NAME, False, f"{evidence}; a reply states no loss")
    noise = torch.tensor(
        [total / (deviation * math.sqrt(len(each.steps))) for total, each in zip(told[1:], replies, strict=True)],
        dtype=torch.float64,
    )
    chance = two_sided_chi_square(noise)
    evidence += f"; {float(noise.square().mean().sqrt()):.2f} x in {len(noise)} replies without a finite loss"
    if chance < _SHARE:
        return Verdict(_NAME, False, f"{evidence}, p {chance:.1e}")
    units = sum(len(step.units) for step in loud.steps)
    most = units * release.clip + float(stats.norm.isf(_SHARE)) * deviation * math.sqrt(len(loud.steps))
    evidence += f"; {units} units of huge loss add {told[0] / release.clip:.1f} bounds"
    return Verdict(_NAME, told[0] <= most, evidence)


def _total(subject: Subject, observed: ObservedRound) -> float:
    """Return what a reply's loss says of the sum over all units and steps."""
    value = observed.header.metrics.get(_METRIC, math.nan)
    return value * subject.promise.expected_batch * len(observed.steps)
