"""Check of the sampler: each slot independently, at the booked rate, cut at the cap, anew in every step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from privacy.doctor.subject import FALSE_ALARM, CutDraws, Subject, Verdict

__all__ = ["overlap_fault", "sampler_is_poisson"]

_NAME = "sampler is Poisson at the booked rate"
_SHARE = FALSE_ALARM / 5
"""Five tests share the error rate."""
_NEGLIGIBLE = 1e-15
_RARE = 8.0
"""Shared slots beyond the normal bound that are no fault yet: a small number of them is Poisson and not normal. With
these the chance of a false alarm is below 1e-8 for every mean up to 50 (scipy.stats.poisson)."""


def sampler_is_poisson(subject: Subject) -> Verdict:
    """How often each slot is drawn, how many are drawn at once, and what two draws in a row share.

    A fixed batch size fails the second, shuffled epochs fail the third (and the second). Where a cap is promised, the
    first two again under a cap that always cuts, with half of the slots empty: the cut is made among slots, empty ones
    included, and every drawn slot is as likely to be kept.
    """
    sampling, draws = subject.plan.sampling, subject.draws
    booked = subject.promise.expected_batch / subject.promise.published_units
    sizes = np.arange(sampling.slots + 1)
    chances = _size_distribution(sampling.slots, booked, sampling.cap)
    inclusion = float(sizes @ chances) / sampling.slots
    faults = [
        _slots(draws, sampling.slots, inclusion),
        _sizes(draws, chances),
        overlap_fault(list(zip(draws[::2], draws[1::2], strict=False)), sampling.slots, _SHARE),
        *_cut_faults(subject.cut),
    ]
    found = [fault for fault in faults if fault]
    if found:
        return Verdict(_NAME, False, "; ".join(found))
    mean = float(np.mean([len(draw) for draw in draws]))
    evidence = (
        f"{len(draws)} draws from {sampling.slots} slots at rate {booked:.4g}: {mean:.2f} units on average, "
        f"{inclusion * sampling.slots:.2f} expected; inclusion, size and overlap fit (error rate {FALSE_ALARM:g})"
    )
    if subject.cut is not None:
        evidence += f"; {len(subject.cut.draws)} draws under a cap of {subject.cut.sampling.cap} fit, too"
    return Verdict(_NAME, True, evidence)


def _size_distribution(slots: int, rate: float, cap: int | None) -> np.ndarray:
    """Return the chance of each number of drawn slots, shape (slots + 1,): binomial, cut at the cap."""
    chances = np.asarray(stats.binom.pmf(np.arange(slots + 1), slots, rate))
    if cap is not None and cap < slots:
        chances[cap] += chances[cap + 1 :].sum()
        chances[cap + 1 :] = 0.0
    return chances


def _slots(draws: tuple[np.ndarray, ...], slots: int, inclusion: float) -> str:
    """Each slot's count is binomial; exact two-sided tests, Bonferroni over the slots."""
    counts = np.bincount(np.concatenate(draws).astype(np.int64), minlength=slots)
    if len(counts) > slots or any(len(np.unique(draw)) != len(draw) for draw in draws):
        return "a draw holds a position twice, or one beyond the last slot"
    law = stats.binom(len(draws), min(inclusion, 1.0))
    chance = 2 * np.minimum(law.cdf(counts), law.sf(counts - 1))
    worst = int(np.argmin(chance))
    if chance[worst] >= _SHARE / slots:
        return ""
    return f"slot {worst} was drawn {counts[worst]} times in {len(draws)} draws, {len(draws) * inclusion:.1f} expected"


def _sizes(draws: tuple[np.ndarray, ...], chances: np.ndarray) -> str:
    """The empirical distribution of the sizes is near the true one (Massart 1990: valid for any number of draws)."""
    seen = np.bincount([len(draw) for draw in draws], minlength=len(chances))[: len(chances)] / len(draws)
    distance = float(np.abs(np.cumsum(seen) - np.cumsum(chances)).max())
    allowed = math.sqrt(math.log(2 / _SHARE) / (2 * len(draws)))
    if distance <= allowed:
        return ""
    spread = float(np.std([len(draw) for draw in draws]))
    center = float(np.arange(len(chances)) @ chances)
    expected = math.sqrt(max(float(np.square(np.arange(len(chances)) - center) @ chances), 0.0))
    return (
        f"batch sizes are not binomial: standard deviation {spread:.2f}, {expected:.2f} expected "
        f"(distance {distance:.3f}, at most {allowed:.3f})"
    )


def _cut_faults(cut: CutDraws | None) -> tuple[str, ...]:
    """Return the faults of draws that a cap cuts."""
    if cut is None:
        return ()
    slots, filled = cut.sampling.slots, cut.num_units
    kept = _size_distribution(slots, cut.sampling.rate, cut.sampling.cap)
    inclusion = float(np.arange(slots + 1) @ kept) / slots
    # Of k kept slots, a uniformly random subset, a hypergeometric number is filled.
    chances = np.zeros(filled + 1)
    for size in np.flatnonzero(kept > _NEGLIGIBLE):
        chances += kept[size] * stats.hypergeom.pmf(np.arange(filled + 1), slots, filled, size)
    faults = (_slots(cut.draws, filled, inclusion), _sizes(cut.draws, chances / chances.sum()))
    return tuple(f"under a cap of {cut.sampling.cap}, {fault}" for fault in faults if fault)


def overlap_fault(pairs: Sequence[tuple[np.ndarray, np.ndarray]], slots: int, share: float) -> str:
    """Return a fault or "": draws of sizes a and b share a hypergeometric number of slots, with mean ab/slots.

    Their sum is nearly normal; `share` is the chance of a false alarm.
    """
    shared = expected = variance = 0.0
    for left, right in pairs:
        a, b = len(left), len(right)
        shared += len(np.intersect1d(left, right))
        expected += a * b / slots
        variance += a * b * (slots - a) * (slots - b) / (slots**2 * max(slots - 1, 1))
    if abs(shared - expected) <= float(stats.norm.isf(share / 2)) * math.sqrt(variance) + _RARE:
        return ""
    return f"draws share {shared:.0f} slots, {expected:.0f} expected: they are not independent"
