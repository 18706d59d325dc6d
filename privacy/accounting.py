"""What executed steps cost: (ε, δ) by privacy loss distributions (PLD), through `dp_accounting`.

Every number here is an upper bound whatever the grid: a coarse grid is loose, never wrong (Doroshenko et al. 2022,
arXiv 2207.04380). The grid is halved until ε moves by less than one percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache, reduce

from dp_accounting.pld import privacy_loss_distribution as pld

from privacy.mechanisms import SubsampledGaussian

__all__ = ["ACCOUNTANT", "COARSEST_GRID", "epsilon_of", "epsilon_on_grid", "grid_of"]

ACCOUNTANT = "dp-accounting PLD, add or remove one record"
COARSEST_GRID = 1e-3
_FINEST_GRID, _TOLERANCE = 1e-5, 0.01


def epsilon_of(mechanisms: Iterable[SubsampledGaussian], delta: float) -> float:
    """Return the ε at `delta` of all mechanisms composed, on one data set, for adding or removing one record.

    No mechanism, or none with a step, costs 0. A mechanism without noise costs infinity.
    """
    merged = _merged(mechanisms)
    if not merged:
        return 0.0
    if any(mechanism.noise_multiplier == 0 for mechanism in merged):
        return math.inf
    return _epsilon(merged, delta)


def _merged(mechanisms: Iterable[SubsampledGaussian]) -> tuple[SubsampledGaussian, ...]:
    """Return one mechanism per (rate, noise): steps with the same parameters compose faster together."""
    steps: dict[tuple[float, float], int] = {}
    for mechanism in mechanisms:
        key = (mechanism.sampling_rate, mechanism.noise_multiplier)
        steps[key] = steps.get(key, 0) + mechanism.steps
    return tuple(SubsampledGaussian(*key, count) for key, count in sorted(steps.items()) if count > 0)


@lru_cache(maxsize=4096)
def _epsilon(merged: tuple[SubsampledGaussian, ...], delta: float) -> float:
    return epsilon_on_grid(merged, delta, grid_of(merged, delta))


def grid_of(merged: tuple[SubsampledGaussian, ...], delta: float) -> float:
    """Return the grid that `epsilon_of` uses: the first whose ε is within one percent of that of twice the interval."""
    parameters = tuple((mechanism.sampling_rate, mechanism.noise_multiplier) for mechanism in merged)
    return _converged_interval(parameters, _power_of_two(max(mechanism.steps for mechanism in merged)), delta)


def epsilon_on_grid(merged: tuple[SubsampledGaussian, ...], delta: float, interval: float) -> float:
    """Return ε on one grid: an upper bound for any `interval`, tighter and slower for a smaller one."""
    losses = [_one_step(m.sampling_rate, m.noise_multiplier, interval).self_compose(m.steps) for m in merged]
    return float(reduce(lambda left, right: left.compose(right), losses).get_epsilon_for_delta(delta))


def _power_of_two(steps: int) -> int:
    """Round up, so that the grid is chosen once per doubling of the steps and not anew at every round."""
    return 1 << (steps - 1).bit_length()


@lru_cache(maxsize=1024)
def _converged_interval(parameters: tuple[tuple[float, float], ...], steps: int, delta: float) -> float:
    merged = tuple(SubsampledGaussian(rate, noise, steps) for rate, noise in parameters)
    interval = COARSEST_GRID
    epsilon = epsilon_on_grid(merged, delta, interval)
    while interval > _FINEST_GRID:
        finer = epsilon_on_grid(merged, delta, interval / 2)
        if abs(epsilon - finer) <= _TOLERANCE * finer:
            return interval / 2
        interval, epsilon = interval / 2, finer
    return interval


@lru_cache(maxsize=64)
def _one_step(rate: float, noise_multiplier: float, interval: float) -> pld.PrivacyLossDistribution:
    return pld.from_gaussian_mechanism(noise_multiplier, sampling_prob=rate, value_discretization_interval=interval)
