"""Privacy loss distributions (PLD) of Poisson-sampled Gaussian sums, for a unit, a group of units and cut batches.

One step is a pair of distributions (with the group, without it) that dominates every pair of neighbors; its loss is
discretized here, vectorized, and composed by `dp_accounting`. Cells of the grid keep both their masses while the loss is
moved to the cell's ends ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380), which never understates ε:
a coarse grid is loose, never wrong.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from scipy.special import logsumexp, ndtr
from scipy.stats import binom

from privacy.mechanisms import SubsampledGaussian

__all__ = ["COARSEST_GRID", "FINEST_GRID", "LOUDEST_SIGNAL", "epsilon_on_grid", "pld_epsilon"]

COARSEST_GRID, FINEST_GRID = 4e-3, 4e-3 / 128
LOUDEST_SIGNAL = 20.0
"""Group size over noise multiplier above which losses do not fit the grid; no ε there is worth its name."""

_TOLERANCE = 1e-3
_TAIL = 10.0  # standard deviations; what lies beyond, 1e-23, is booked as an infinite loss
_CACHED_FROM = 8  # mechanisms; shorter compositions are cheaper to repeat than to keep


def pld_epsilon(mechanisms: tuple[SubsampledGaussian, ...], delta: float, group_size: int = 1) -> float:
    """Return ε of `mechanisms` composed, on the first grid whose ε is within 0.1 % of that of twice the interval.

    The discretization error falls with the square of the interval, so about 0.03 % of it is left.
    """
    interval = COARSEST_GRID
    coarser = epsilon_on_grid(mechanisms, delta, interval, group_size)
    while interval > FINEST_GRID:
        interval /= 2
        epsilon = epsilon_on_grid(mechanisms, delta, interval, group_size)
        if coarser - epsilon <= _TOLERANCE * epsilon:
            return epsilon
        coarser = epsilon
    return coarser


def epsilon_on_grid(
    mechanisms: tuple[SubsampledGaussian, ...], delta: float, interval: float, group_size: int = 1
) -> float:
    """Return ε on one grid: an upper bound for any `interval`, tighter and slower for a smaller one."""
    return float(_composed(mechanisms, group_size, interval).get_epsilon_for_delta(delta))


def _composed(mechanisms: tuple[SubsampledGaussian, ...], group_size: int, interval: float) -> PrivacyLossDistribution:
    if len(mechanisms) >= _CACHED_FROM:
        return _joined(mechanisms, group_size, interval)
    return _compose(mechanisms, group_size, interval)


def _compose(mechanisms: tuple[SubsampledGaussian, ...], group_size: int, interval: float) -> PrivacyLossDistribution:
    if len(mechanisms) == 1:
        step = _one_step(replace(mechanisms[0], steps=1), group_size, interval)
        return step if mechanisms[0].steps == 1 else step.self_compose(mechanisms[0].steps)
    # Halves that end at powers of two: an entry more at the end of a history leaves all but log(n) of them as they are.
    middle = 1 << (len(mechanisms) - 1).bit_length() - 1
    left, right = (_composed(half, group_size, interval) for half in (mechanisms[:middle], mechanisms[middle:]))
    return left.compose(right)


_joined = lru_cache(maxsize=64)(_compose)


def _one_step(mechanism: SubsampledGaussian, group_size: int, interval: float) -> PrivacyLossDistribution:
    """Return the PLD of one step for a group of `group_size` units.

    Poisson sampling: Binomial(group size, rate) of the group are drawn, whatever else is, and each moves the sum by at
    most one sensitivity: a mixture of Gaussians against one of them (arXiv 2310.15526; one unit: the subsampled
    Gaussian).

    A cut at `cap` of `slots` slots: neighbors differ in emptied slots, so the draw has one distribution for both, and
    whether the others' draw leaves room for the whole group may be told. If it does, nothing is cut: the pair above. If
    not, the whole selection may be told: it holds j of the group, j at most the number drawn, and moves the sum by at
    most j. Telling more never lowers the loss, so the mixture of both dominates (joint convexity). It is far tighter than
    counting each such step as an infinite loss, and needs no bound on who displaces whom (arXiv 2508.15089, which it
    is compared with in the tests).
    """
    noise, drawn = mechanism.noise_multiplier, np.arange(group_size + 1)
    weights = binom.pmf(drawn, group_size, mechanism.sampling_rate)
    drawn, weights = drawn[weights > 0], weights[weights > 0]
    sampled = _against_zero(noise, drawn, weights, interval)
    cut = 0.0
    if mechanism.truncation is not None:
        others, room = mechanism.truncation.slots - group_size, mechanism.truncation.cap - group_size
        cut = 1.0 if others < 0 else float(binom.sf(room, others, mechanism.sampling_rate))
    if cut == 0:
        return sampled
    told, told_weight = _against_zero(noise, drawn[:1], np.ones(1), interval), weights[0]
    for count, weight in zip(drawn[1:], weights[1:], strict=True):
        told_weight += weight
        told = _against_zero(noise, np.array([count]), np.ones(1), interval).compute_mixture(
            told, min(1.0, weight / told_weight)
        )
    return told.compute_mixture(sampled, cut)


def _against_zero(noise: float, shifts: np.ndarray, weights: np.ndarray, interval: float) -> PrivacyLossDistribution:
    """Return the PLD of sum_j weights_j N(shifts_j, noise²) against N(0, noise²), in both directions.

    The loss log sum_j weights_j exp((2 shifts_j x - shifts_j²) / (2 noise²)) grows with x, so the cells of the grid
    are intervals of x.
    """
    if shifts[-1] == 0:
        same = DensePLDPmf(interval, 0, np.ones(1), 0.0, pessimistic_estimate=True)
        return PrivacyLossDistribution(same, same)

    def loss(x: float) -> float:
        return float(logsumexp((2 * shifts * x - shifts**2) / (2 * noise**2), b=weights))

    first = int(np.floor(loss(-_TAIL * noise) / interval))
    last = int(np.ceil(loss(shifts[-1] + _TAIL * noise) / interval))
    grid = np.arange(first, last + 1)
    x = _where_loss_is(grid * interval, noise, shifts, weights)
    edges = np.concatenate(([-np.inf], x, [np.inf]))
    without = _normal_masses(edges / noise)
    with_group = sum(
        weight * _normal_masses((edges - shift) / noise) for shift, weight in zip(shifts, weights, strict=True)
    )
    removed = _discretized(with_group, without, grid, interval)
    added = _discretized(without[::-1], np.asarray(with_group)[::-1], -grid[::-1], interval)
    return PrivacyLossDistribution(removed, added)


def _where_loss_is(losses: np.ndarray, noise: float, shifts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the x of each loss; minus infinity where the loss is below all.

    The shift 0 is moved to the other side, which leaves a convex function with slopes of at least 1/noise²: Newton's
    method started to the right of the root converges from there. With one shift it starts at the root.
    """
    moved = shifts > 0
    j, log_weight = shifts[moved, None], np.log(weights[moved, None])
    rest = weights[~moved].sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        target = losses + np.log1p(-rest * np.exp(-losses))
    target = np.where(np.isnan(target), -np.inf, target)
    reached = np.isfinite(target)
    goal = target[reached]
    root = ((goal - log_weight) * noise**2 / j + j / 2).min(axis=0)
    for _ in range(50 if len(j) > 1 else 0):
        terms = log_weight + (2 * j * root - j**2) / (2 * noise**2)
        height = logsumexp(terms, axis=0)
        slope = (np.exp(terms - height) * j).sum(axis=0) / noise**2
        step = (height - goal) / slope
        root = root - step
        if np.abs(step).max() <= 1e-13 * (1 + np.abs(root).max()):
            break
    x = np.full(losses.shape, -np.inf)
    x[reached] = root
    return x


def _normal_masses(edges: np.ndarray) -> np.ndarray:
    """Return the mass of N(0, 1) between consecutive edges, precise in both tails."""
    low, high = edges[:-1], edges[1:]
    return np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))


def _discretized(upper: np.ndarray, lower: np.ndarray, grid: np.ndarray, interval: float) -> DensePLDPmf:
    """Return the loss of `upper` against `lower`, given their masses per cell of the grid and beyond its two ends.

    Of a cell's mass, as much goes to its upper end as keeps the mass of `lower` too. Losses below the grid are raised to
    its first point, losses above it are infinite.
    """
    probabilities = np.zeros(len(grid))
    inside, low_end = upper[1:-1], np.exp(grid[:-1] * interval)
    raised = np.clip((inside - lower[1:-1] * low_end) / -np.expm1(-interval), 0.0, inside)
    probabilities[1:] += raised
    probabilities[:-1] += inside - raised
    probabilities[0] += upper[0]
    return DensePLDPmf(interval, int(grid[0]), probabilities, float(upper[-1]), pessimistic_estimate=True)
