"""dp-accounting's losses on a grid, with two of its operations made faster, and one of them more precise.

Composition with itself takes transforms of real numbers over fewer cells, and is precise in the tail, where the
library's rounding is more than a small δ; ε is found in vectors where the library takes a step per cell. Mixtures and
the composition of different losses are the library's.
"""

from __future__ import annotations

import math
from typing import Self

import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf, PLDPmf
from numpy.fft import irfft, rfft
from scipy.fft import next_fast_len

__all__ = ["GridLosses"]

_ORDERS = 2.0 ** np.arange(-10, 8)
"""Of the tail bound, as multiples of the best order for a Gaussian: heavier tails want smaller ones, lighter larger."""


class GridLosses(DensePLDPmf):
    """How probable the losses `first` x `interval`, (`first` + 1) x `interval`, ... are, and an infinite one."""

    def __init__(self, interval: float, first: int, probabilities: np.ndarray, infinite: float) -> None:
        super().__init__(interval, first, probabilities, infinite, pessimistic_estimate=True)

    @classmethod
    def _of(cls, dense: DensePLDPmf) -> Self:
        return cls(dense._discretization, dense._lower_loss, dense._probs, dense._infinity_mass)

    def compute_mixture(self, other: PLDPmf, self_weight: float) -> Self:
        """Return losses that are these with probability `self_weight`, and `other` ones else."""
        return self._of(super().compute_mixture(other, self_weight).to_dense_pmf())

    def compose(self, other: DensePLDPmf, tail_mass_truncation: float = 0) -> Self:
        """Return the sum of these losses and independent `other` ones."""
        return self._of(super().compose(other, tail_mass_truncation))

    def self_compose(self, num_times: int, tail_mass_truncation: float = 1e-15) -> Self:
        """Return the sum of `num_times` independent such losses.

        What lies beyond the cells is booked as infinite; it also wraps around and is counted in them, which overstates
        ε. Both are at most `tail_mass_truncation`, which must be above 0.

        A transform errs by about `num_times` x 1e-16 of its largest value at every cell, so the library's ε at
        δ = 1e-10 after 100,000 steps of a rare sample is half a percent too small or too large. Here the tail is taken
        from a second transform, of the losses weighted by exp(tilt x loss), which is large where they are rare; each
        cell takes the one that errs less.
        """
        low, high, steepest = self._range(num_times, tail_mass_truncation)
        places = np.arange(low, high + 1)
        sums, errs = np.zeros(len(places)), np.full(len(places), np.inf)
        for tilt in (0.0, steepest / 2):
            weighted = self._probs * np.exp(tilt * np.arange(1 - self.size, 1))
            moment = weighted.sum()
            tilted = _convolved(weighted / moment, num_times, low, high)
            log_scale = num_times * (math.log(moment) + tilt * (self.size - 1)) - tilt * places
            log_error = log_scale + math.log(tilted.max())
            better = log_error < errs
            sums[better] = tilted[better] * np.exp(log_scale[better])
            errs[better] = log_error[better]
        infinite = tail_mass_truncation - math.expm1(num_times * math.log1p(-self._infinity_mass))
        return type(self)(self._discretization, num_times * self._lower_loss + low, sums, infinite)

    def get_epsilon_for_delta(self, delta: float) -> float:
        """Return the smallest ε >= 0 whose hockey-stick divergence is at most `delta`: infinity where none is.

        Of the losses above ε, U is the probability and L the sum of p exp(-loss): U - exp(ε) L = δ. Going down the grid
        ε is found at the first loss that is not above log((U - δ) / L) of the losses before it.
        """
        if self._infinity_mass > delta:
            return math.inf
        positive = slice(max(0, 1 - self._lower_loss), None)
        losses = ((np.arange(self.size)[positive] + self._lower_loss) * self._discretization)[::-1]
        falling = self._probs[positive][::-1]
        upper = self._infinity_mass + np.concatenate(([0.0], np.cumsum(falling)))
        lower = np.concatenate(([0.0], np.cumsum(falling * np.exp(-losses))))
        too_far = np.flatnonzero((upper[1:] >= delta) & (lower[1:] == 0))
        if too_far.size:  # exp(-loss) is 0 in double precision
            return float(losses[too_far[0]])
        with np.errstate(divide="ignore", invalid="ignore"):
            epsilons = np.log(upper - delta) - np.log(lower)
        found = np.flatnonzero((upper > delta) & (lower > 0) & (epsilons >= np.append(losses, 0.0)))
        return float(epsilons[found[0]]) if found.size else 0.0

    def _range(self, times: int, beyond: float) -> tuple[int, int, float]:
        """Return the cells, from `times` x the first, beyond which a sum of `times` has a probability of `beyond`.

        And the order, per cell, that bounds the upper tail best. Chernoff: P(sum - mean >= b) <= exp(times K(t) - t b)
        at every order t > 0, K the log of the moment generating function about the mean. Each order is twice the one
        before, so its exponentials are their squares.
        """
        cells = np.arange(self.size)
        mean = float(self._probs @ cells / self._probs.sum())
        variance = float(self._probs @ (cells - mean) ** 2)
        surprise = math.log(2 / beyond)
        gaussian = math.sqrt(2 * surprise / (times * max(variance, 1e-12)))

        def reach(distances: np.ndarray) -> tuple[float, float]:
            bound, powers = math.inf, np.exp(gaussian * _ORDERS[0] * distances)
            for order in gaussian * _ORDERS:
                before, bound = bound, (times * math.log(self._probs @ powers) + surprise) / order
                if bound > before:  # it falls to its least, then rises
                    return before, order / 2
                powers *= powers
            return bound, gaussian * _ORDERS[-1]

        with np.errstate(over="ignore"):
            (below, _), (above, steepest) = reach(mean - cells), reach(cells - mean)
        first, last = math.floor(times * mean - below), math.ceil(times * mean + above)
        return max(0, first), min(times * (self.size - 1), last), steepest


def _convolved(probabilities: np.ndarray, times: int, low: int, high: int) -> np.ndarray:
    """Return the cells from `low` to `high` of `times` such variables' sum, cells beyond them wrapped around."""
    length = next_fast_len(max(high - low + 1, len(probabilities)), real=True)
    sums = irfft(_power(rfft(probabilities, length), times), length)
    return np.roll(sums, -low)[: high - low + 1]


def _power(waves: np.ndarray, times: int) -> np.ndarray:
    """Return `waves` to the power `times`, which is at least 1, by squaring: far cheaper than a complex power."""
    power = waves if times & 1 else np.ones_like(waves)
    while times := times >> 1:
        waves = waves * waves
        power = power * waves if times & 1 else power
    return power
