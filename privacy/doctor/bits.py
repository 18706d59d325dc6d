"""Check of the low bits: a released value must not tell by its last digits which sum the noise was added to.

Mironov 2012 (doi 10.1145/2382196.2382264) on why; docs/decisions/0005-noise.md on the lattice and the grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from privacy.doctor.subject import ObservedRound, Subject, Verdict

__all__ = ["low_bits_tell_nothing"]

_NAME = "released values lie on the lattice, and use all of it"
_FLOAT32 = 2.0**-22
"""Relative error of a float32 quotient, with two bits to spare; devices may multiply by a rounded reciprocal."""
_EXACT = 1 << 22
"""Steps up to which a float32 quotient tells the lattice point."""
_EXCESS, _RARE = 4.0, 60


def low_bits_tell_nothing(subject: Subject) -> Verdict:
    """Every released value is a multiple of the public spacing, and noise alone does not repeat itself.

    Noise drawn or rounded to few bits (bf16 has 8) falls on few points of the lattice, so many of n values are equal.
    Of n independent values of a Gaussian of s ≫ 1 steps, n (n - 1) / (4 √π s) pairs are, on average. Four times as many
    and 60 have a chance below 1e-6: by Chernoff's bound for the Poisson number that rare pairs are, by Chebyshev's
    inequality with the exact variance of the number of pairs where they are many.
    """
    plan = subject.plan
    if not plan.is_private:
        return Verdict(_NAME, None, "no noise is promised")
    if not subject.exact_release:
        return Verdict(_NAME, None, "a local objective, or 16-bit parameters, stand between the noise and what is seen")
    spacing = _spacing(subject)
    normalizer = subject.promise.expected_batch
    everything = _values(subject.trained), _values(subject.noise_alone)
    off = 0
    for values in everything:
        steps = values * (normalizer / spacing)
        off += int(((steps - steps.round()).abs() > steps.abs() * _FLOAT32 + 1e-6).sum())
    count = sum(map(len, everything))
    if off:
        return Verdict(
            _NAME, False, f"{off} of {count} values are no multiples of {spacing:.3g}: rounded too early, or not"
        )
    steps = (everything[1] * (normalizer / spacing)).round()
    steps = steps[steps.abs() < _EXACT]
    deviation = plan.noise_multiplier * plan.clip_norm / spacing
    repeated = steps.unique(return_counts=True)[1].double()
    pairs = float((repeated * (repeated - 1)).sum() / 2)
    expected = len(steps) * (len(steps) - 1) / (4 * math.sqrt(math.pi) * deviation)
    evidence = (
        f"{count} values are multiples of {spacing:.3g}; {pairs:.0f} pairs of equal noise, {expected:.1f} expected"
    )
    return Verdict(_NAME, pairs <= _EXCESS * expected + _RARE, evidence)


def _values(rounds: Iterable[ObservedRound]) -> torch.Tensor:
    parts = [part for observed in rounds for step in observed.steps for part in step.gradient]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def _spacing(subject: Subject) -> float:
    """Return the spacing that decision 0005 states, worked out here: what is examined uses its own."""
    plan = subject.plan
    deviation = plan.noise_multiplier * plan.clip_norm
    if not plan.discrete:
        return 2.0 ** (math.floor(math.log2(deviation)) - 18)
    for_rounding = 2.0 ** math.floor(math.log2(plan.clip_norm / (128 * math.sqrt(subject.dimension))))
    return max(for_rounding, 2.0 ** math.ceil(math.log2(deviation / 2**24)))
