"""What stated figures ought to be, by ways that share as little as possible with the ones that stated them.

* `Recomputation.at_most`: dp-accounting's own discretization of each step, an upper bound.
* `Recomputation.at_least`: a lower bound. A step's outputs are merged into intervals, which is post-processing and so
  never raises ε; the privacy loss of an interval is then rounded down to the grid.
* `renyi_cost`: a Rényi cost by integration, for the filter.

A history that has grown by one entry is composed with that entry; nothing is composed twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.pld.pld_pmf import DensePLDPmf
from scipy.special import logsumexp, ndtr
from scipy.stats import binom

from privacy.mechanisms import SubsampledGaussian

__all__ = ["Recomputation", "renyi_cost", "steps_of"]

_FINEST, _COARSEST = 1e-4, 1e-2
_POINTS = 25  # of the grid per standard deviation of a step's privacy loss, which is about q/σ
_LOUDEST = 20.0  # signal over noise, beyond which the accountant states infinity
_REACH = 10.0  # standard deviations; what lies beyond is one interval
_TAIL = 1e-13  # probability, per entry, that is moved to where it does not harm the bound
_SELDOM = 1e-2  # of δ: the most that cut batches may take of it
_KEPT = 64

_History = frozenset[tuple[SubsampledGaussian, int]]


class Recomputation:
    """Figures of the growing histories of one ledger."""

    def __init__(self, mechanisms: Iterable[SubsampledGaussian]) -> None:
        """Choose the grid.

        Args:
            mechanisms: everything booked. The quietest step sets the grid of all, for only losses on one grid compose.
        """
        spreads = [one.sampling_rate / one.noise_multiplier for one in mechanisms if one.steps and one.noise_multiplier]
        grid = min(_COARSEST, max(_FINEST, min(spreads, default=1.0) / _POINTS))
        self._upper = _Compositions[pld.PrivacyLossDistribution](lambda step: _library_step(step, grid))
        self._lower = _Compositions[DensePLDPmf](lambda step: _merged_step(step, grid))

    def at_most(self, mechanisms: Sequence[SubsampledGaussian], delta: float) -> float | None:
        """Return an ε that the true one does not exceed; seldom a percent above it.

        A step whose batch would be cut is booked as an infinite loss. None where that, discrete noise, or next to no
        noise asks for another accountant.
        """
        cut = sum(one.steps * _cut_probability(one) for one in mechanisms)
        if cut > _SELDOM * delta or any(one.discrete or one.noise_multiplier * _LOUDEST < 1 for one in mechanisms):
            return None
        return self._upper.epsilon(_plain(mechanisms), delta - cut)

    def at_least(self, mechanisms: Sequence[SubsampledGaussian], delta: float) -> float:
        """Return an ε that the true one is not below.

        Cut batches and discrete noise are taken as uncut and continuous, which they differ from by little.
        """
        plain = _plain(mechanisms)
        if any(one.noise_multiplier == 0 for one in plain):
            return math.inf
        return self._lower.epsilon([one for one in plain if one.noise_multiplier * _LOUDEST >= 1], delta)


def renyi_cost(mechanisms: Iterable[SubsampledGaussian], order: int) -> float:
    """Return the Rényi cost at `order`, cut batches taken as uncut and discrete noise as continuous.

    log E[((1 - q) + q exp((2x - 1) / (2σ²)))^α] / (α - 1) for x of N(0, σ²), the larger of the two directions (Mironov,
    Talwar and Zhang 2019, arXiv 1908.10530, Theorem 4), by the trapezoidal rule.
    """
    return sum(
        count * _renyi_step(one.sampling_rate, one.noise_multiplier, order)
        for one, count in steps_of(mechanisms).items()
        if count
    )


@lru_cache(maxsize=256)
def _renyi_step(rate: float, noise: float, order: int) -> float:
    if noise == 0:
        return math.inf
    width = min(noise, noise**2) / 20  # the integrand has poles at a distance of πσ² from the real line
    x = np.arange(-2 * _REACH * noise, order + 2 * _REACH * noise, width)
    absent = math.log1p(-rate) if rate < 1 else -math.inf
    ratio = np.logaddexp(absent, math.log(rate) + (2 * x - 1) / (2 * noise**2))
    density = -0.5 * (x / noise) ** 2 - math.log(noise * math.sqrt(2 * math.pi))
    moment = float(np.asarray(logsumexp(density + order * ratio)))
    return (moment + math.log(width)) / (order - 1)


def steps_of(mechanisms: Iterable[SubsampledGaussian]) -> dict[SubsampledGaussian, int]:
    """Return how many steps of each kind were executed; the keys have one step."""
    steps: Counter[SubsampledGaussian] = Counter()
    for one, count in Counter(mechanisms).items():
        steps[one.repeated(1)] += one.steps * count
    return dict(steps)


class _Losses(Protocol):
    def compose(self, other: Self, tail_mass_truncation: float, /) -> Self: ...

    def self_compose(self, num_times: int, /) -> Self: ...

    def get_epsilon_for_delta(self, delta: float, /) -> float: ...


_L = TypeVar("_L", bound=_Losses)


class _Compositions(Generic[_L]):
    """Privacy losses of histories; the latest are remembered, for most histories are an earlier one and an entry."""

    def __init__(self, step: Callable[[SubsampledGaussian], _L]) -> None:
        self._step = step
        self._entries: dict[SubsampledGaussian, _L] = {}
        self._histories: dict[_History, _L] = {}

    def epsilon(self, mechanisms: Sequence[SubsampledGaussian], delta: float) -> float:
        return float(self._composed(mechanisms).get_epsilon_for_delta(delta)) if mechanisms else 0.0

    def _composed(self, mechanisms: Sequence[SubsampledGaussian]) -> _L:
        history = _merged(mechanisms)
        if history not in self._histories:
            before = self._histories.get(_merged(mechanisms[:-1]))
            if before is None:
                *others, last = (self._entry(step.repeated(count)) for step, count in history)
                for other in others:
                    last = last.compose(other, _TAIL)
            else:
                last = before.compose(self._entry(mechanisms[-1]), _TAIL)
            self._histories[history] = last
            if len(self._histories) > _KEPT:
                del self._histories[next(iter(self._histories))]
        return self._histories[history]

    def _entry(self, mechanism: SubsampledGaussian) -> _L:
        if mechanism not in self._entries:
            once = self._step(mechanism)
            self._entries[mechanism] = once if mechanism.steps == 1 else once.self_compose(mechanism.steps)
        return self._entries[mechanism]


def _merged(mechanisms: Iterable[SubsampledGaussian]) -> _History:
    return frozenset(steps_of(mechanisms).items())


def _plain(mechanisms: Iterable[SubsampledGaussian]) -> list[SubsampledGaussian]:
    return [_uncut(one) for one in mechanisms if one.steps]


@lru_cache(maxsize=1024)
def _uncut(mechanism: SubsampledGaussian) -> SubsampledGaussian:
    return SubsampledGaussian(mechanism.sampling_rate, mechanism.noise_multiplier, mechanism.steps)


@lru_cache(maxsize=1024)
def _cut_probability(step: SubsampledGaussian) -> float:
    cut = step.truncation
    return 0.0 if cut is None else float(binom.sf(cut.cap - 1, cut.slots - 1, step.sampling_rate))


def _library_step(step: SubsampledGaussian, grid: float) -> pld.PrivacyLossDistribution:
    return pld.from_gaussian_mechanism(
        step.noise_multiplier, value_discretization_interval=grid, sampling_prob=step.sampling_rate
    )


def _merged_step(step: SubsampledGaussian, grid: float) -> DensePLDPmf:
    """Return losses that the true ones of (1-q) N(0, σ²) + q N(1, σ²) against N(0, σ²) dominate.

    Intervals whose ends lie half a cell below and above a point of the grid have a loss close to it. Their ends are
    moved up until it is not below; what is below still is rounded down by a whole cell, which is sound and rare.
    """
    rate, noise = step.sampling_rate, step.noise_multiplier
    last = math.log(rate) + (1 + 2 * _REACH * noise) / (2 * noise**2)
    highest = float(np.logaddexp(math.log1p(-rate), last)) if rate < 1 else last
    lowest = math.log1p(-rate) if rate < 1 else (-1 - 2 * _REACH * noise) / (2 * noise**2)
    points = np.arange(math.ceil(lowest / grid + 0.5), math.floor(highest / grid) + 1)
    ends = points - 0.5
    for _ in range(6):
        inside, loss = _intervals(ends * grid, rate, noise)
        short = np.maximum(0.0, points - loss[1:] / grid)
        ends = np.maximum.accumulate(ends + 1.05 * np.maximum(short, np.concatenate(([0.0], short[:-1]))))
    inside, loss = _intervals(ends * grid, rate, noise)
    present = inside > 0
    cells = np.floor(loss[present] / grid + 1e-9).astype(int)
    masses = np.bincount(cells - cells.min(), weights=inside[present])
    return DensePLDPmf(grid, int(cells.min()), masses, 0.0, pessimistic_estimate=False)


def _intervals(losses: np.ndarray, rate: float, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the mass of the mixture between outputs with these losses, and the loss of each such interval."""
    with np.errstate(divide="ignore", invalid="ignore"):
        x = noise**2 * (losses + np.log1p(-(1 - rate) * np.exp(-losses)) - math.log(rate)) + 0.5
        edges = np.concatenate(([-np.inf], np.where(np.isnan(x), -np.inf, x), [np.inf]))
        centered, shifted = _masses(edges / noise), _masses((edges - 1) / noise)
        mixed = (1 - rate) * centered + rate * shifted
        loss = np.log(mixed) - np.log(centered)
    return np.where(np.isfinite(loss), mixed, 0.0), np.where(np.isfinite(loss), loss, 0.0)


def _masses(edges: np.ndarray) -> np.ndarray:
    low, high = edges[:-1], edges[1:]
    return np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
