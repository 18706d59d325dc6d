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

_ROUNDING = 1e-15
"""How far a transform may err at any cell, per composed loss, as a part of its largest value."""

_STEEPEST = 700.0
"""An order per cell at which the highest cell alone counts."""


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

        What lies beyond the cells, at most `tail_mass_truncation`, is booked as infinite; it also wraps around and is
        counted in them, which overstates ε.

        A transform errs by about `num_times` x 1e-16 of its largest value at every cell, so the library's ε at
        δ = 1e-10 after 100,000 steps of a rare sample is half a percent too small or too large. Here the tail is taken
        from transforms of the losses weighted by exp(tilt x loss), which are large where the losses are rare; each cell
        takes the one whose rounding is least there. One that would wrap around is left out, and none may exceed the
        first by more than that one's rounding.

        Raises:
            ValueError: `num_times` is below 1.
        """
        if num_times < 1:
            raise ValueError(f"num_times={num_times}: compose one loss at least")
        infinite = tail_mass_truncation - math.expm1(num_times * math.log1p(-min(self._infinity_mass, 1 - 1e-16)))
        if infinite >= 1:
            return type(self)(self._discretization, 0, np.zeros(1), 1.0)
        last = int(np.flatnonzero(self._probs > 0)[-1])
        if last < self.size - 1:
            shorter = type(self)(self._discretization, self._lower_loss, self._probs[: last + 1], self._infinity_mass)
            return shorter.self_compose(num_times, tail_mass_truncation)
        low, high, steepest = self._range(num_times, tail_mass_truncation)
        sums = _convolved(self._probs, num_times, low, high)
        log_rounding = np.full(len(sums), math.log(sums.max()))
        most = np.maximum(sums, 0.0) + num_times * _ROUNDING * sums.max()
        for tilt in (steepest / 2, steepest):
            tilted, log_tilted_rounding = self._tilted(tilt, num_times, low, high)
            better = log_tilted_rounding < log_rounding
            sums[better] = np.minimum(tilted, most)[better]
            log_rounding[better] = log_tilted_rounding[better]
        return type(self)(self._discretization, num_times * self._lower_loss + low, sums, infinite)

    def _tilted(self, tilt: float, times: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a sum's probabilities by a transform of weighted losses, and the log of its rounding, up to a factor.

        The rounding is infinite where the weighted losses would wrap around.
        """
        cells, places = np.arange(self.size), np.arange(low, high + 1)
        weighted = self._probs * np.exp(tilt * (cells - cells[-1]))
        moment = weighted.sum()
        law = weighted / moment
        mean = law @ cells
        if times * mean + 3 * math.sqrt(times * (law @ (cells - mean) ** 2)) > high:
            return np.zeros(len(places)), np.full(len(places), np.inf)
        composed = _convolved(law, times, low, high)
        log_scale = times * (math.log(moment) + tilt * cells[-1]) - tilt * places
        with np.errstate(over="ignore", invalid="ignore"):  # where it is not used
            return composed * np.exp(log_scale), log_scale + math.log(composed.max())

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
        """Return the cells, from `times` x the first, beyond which a sum of `times` has at most `beyond`.

        And the order, per cell, that bounds the upper tail best. Chernoff: P(sum - mean >= b) <= exp(times K(t) - t b)
        at every order t > 0, K the log of the moment generating function about the mean; as t grows the b that suffices
        falls to its least, then rises. Each order is twice the one before, so its exponentials are their squares.
        """
        cells = np.flatnonzero(self._probs > 0)
        masses = self._probs[cells]
        mean = float(masses @ cells / masses.sum())
        variance = float(masses @ (cells - mean) ** 2)
        surprise = math.log(2) - math.log(max(beyond, 1e-300))
        # Below a Gaussian's best, and so low that no exponential is large: from there the bound falls for any law.
        lowest = min(math.sqrt(2 * surprise / (times * max(variance, 1e-300))) / 8, 1 / self.size)

        def reach(distances: np.ndarray) -> tuple[float, float]:
            order, powers = lowest, np.exp(lowest * distances)
            bound = (times * math.log(masses @ powers) + surprise) / order
            while True:
                powers *= powers
                further = (times * math.log(masses @ powers) + surprise) / (2 * order)
                if not further < bound or order > _STEEPEST:
                    return bound, order
                bound, order = further, 2 * order

        with np.errstate(over="ignore"):
            (below, _), (above, steepest) = reach(mean - cells), reach(cells - mean)
        first, last = math.floor(times * mean - below), math.ceil(times * mean + above)
        return max(0, first), min(times * (self.size - 1), max(first, last)), steepest


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
