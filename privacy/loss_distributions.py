"""Privacy loss distributions (PLD) of Poisson-sampled Gaussian sums, for a unit, a group of units and cut batches.

One step is a pair of distributions (with the group, without it) that dominates every pair of neighbors; its loss is
discretized here, vectorized, and composed by `dp_accounting`. Cells of the grid keep both their masses while the loss
is moved to the cell's ends ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380), which never understates ε:
a coarse grid is loose, never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from scipy.special import ndtr
from scipy.stats import binom

from privacy.grid_losses import GridLosses
from privacy.mechanisms import SubsampledGaussian

__all__ = [
    "COARSEST_GRID",
    "FINEST_GRID",
    "LOUDEST_SIGNAL",
    "CutView",
    "epsilon_on_grid",
    "foretold_epsilon",
    "pld_epsilon",
]

COARSEST_GRID, FINEST_GRID = 4e-3, 4e-3 / 128
LOUDEST_SIGNAL = 20.0
"""Group size over noise multiplier above which losses do not fit the grid; no ε there is worth its name."""

_TOLERANCE = 1e-3
_TAIL = 10.0  # standard deviations; what lies beyond, 1e-23, is booked as an infinite loss
_NEGLIGIBLE = 1e-16  # probability of a cut, per step, that is booked as an infinite loss
_CACHED_FROM = 8  # mechanisms; shorter compositions are cheaper to repeat than to keep


CutView = Literal["told", "amplified"]
"""How a cut step is bounded: whichever is tighter, and each is valid."""


@dataclass(frozen=True)
class _Terms:
    group_size: int
    interval: float
    view: CutView


def pld_epsilon(mechanisms: tuple[SubsampledGaussian, ...], delta: float, group_size: int = 1) -> float:
    """Return ε of `mechanisms` composed, on the first grid whose ε is within 0.1 % of that of twice the interval.

    The discretization error falls with the square of the interval, so about 0.03 % of it is left. Of the two bounds on
    a cut batch the one with the smaller ε is taken: each is valid alone.
    """
    coarser = math.inf
    for epsilon in _on_finer_and_finer_grids(mechanisms, delta, group_size):
        if coarser - epsilon <= _TOLERANCE * epsilon:
            return epsilon
        coarser = epsilon
    return coarser


def foretold_epsilon(mechanisms: tuple[SubsampledGaussian, ...], delta: float, tolerance: float) -> float:
    """Return about what `pld_epsilon` will: an estimate to search with, and no bound.

    Its first grids are tried, until one is within `tolerance` of the one before. What the others would still take off
    is foretold: each takes off a part of what the one before did, a quarter to a half.
    """
    epsilon, fell, ratio = math.inf, math.inf, 0.25
    for finer in _on_finer_and_finer_grids(mechanisms, delta, 1):
        falls = epsilon - finer
        if 0 < falls < fell < math.inf:
            ratio = min(max(falls / fell, 0.25), 0.5)
        epsilon, fell = finer, falls
        if fell <= tolerance * epsilon:
            break
    # Where even the finest grid falls steeply, what is foretold may end below 0.
    while math.isfinite(fell) and epsilon > 0 and fell > _TOLERANCE * epsilon:
        fell *= ratio
        epsilon -= fell
    return max(epsilon, 0.0)


def _on_finer_and_finer_grids(
    mechanisms: tuple[SubsampledGaussian, ...], delta: float, group_size: int
) -> Iterator[float]:
    """Yield ε on one grid after the other, each of half the interval."""
    interval = COARSEST_GRID
    views: tuple[CutView, ...] = ("told", "amplified") if any(m.truncation for m in mechanisms) else ("told",)
    coarse = {view: epsilon_on_grid(mechanisms, delta, interval, group_size, view) for view in views}
    view = min(views, key=lambda view: coarse[view])
    yield coarse[view]
    while interval > FINEST_GRID:
        interval /= 2
        yield epsilon_on_grid(mechanisms, delta, interval, group_size, view)


@lru_cache(maxsize=4096)
def epsilon_on_grid(
    mechanisms: tuple[SubsampledGaussian, ...],
    delta: float,
    interval: float,
    group_size: int = 1,
    view: CutView = "told",
) -> float:
    """Return ε on one grid: an upper bound for any `interval`, tighter and slower for a smaller one."""
    return float(_composed(mechanisms, _Terms(group_size, interval, view)).get_epsilon_for_delta(delta))


def _composed(mechanisms: tuple[SubsampledGaussian, ...], terms: _Terms) -> PrivacyLossDistribution:
    return (_remembered if len(mechanisms) >= _CACHED_FROM else _compose)(mechanisms, terms)


def _compose(mechanisms: tuple[SubsampledGaussian, ...], terms: _Terms) -> PrivacyLossDistribution:
    if len(mechanisms) == 1:
        step = _one_step(mechanisms[0], terms)
        return step if mechanisms[0].steps == 1 else step.self_compose(mechanisms[0].steps)
    # Halves that end at powers of two: an entry more at the end of a history leaves all but log(n) of them as they are.
    middle = 1 << (len(mechanisms) - 1).bit_length() - 1
    return _composed(mechanisms[:middle], terms).compose(_composed(mechanisms[middle:], terms))


_remembered = lru_cache(maxsize=64)(_compose)


def _one_step(mechanism: SubsampledGaussian, terms: _Terms) -> PrivacyLossDistribution:
    """Return the PLD of one step for a group of units.

    Poisson sampling: Binomial(group size, rate) of the group are drawn, whatever else is, and each moves the sum by at
    most one sensitivity: a mixture of Gaussians against one of them (arXiv 2310.15526; one unit: the subsampled
    Gaussian).

    A cut at `cap` of `slots` slots: neighbors differ in emptied slots, so both draw the same slots, and whether the
    others' draw leaves room for the whole group may be told. If it does, nothing is cut: the pair above. If not, one of
    the two bounds below holds. Telling more never lowers the loss (joint convexity), so their mixture dominates.
    """
    size = terms.group_size
    weights = binom.pmf(np.arange(size + 1), size, mechanism.sampling_rate)
    sampled = _against_zero(mechanism.noise_multiplier, np.arange(size + 1), weights, terms.interval)
    if mechanism.truncation is None:
        return sampled
    others, room = mechanism.truncation.slots - size, mechanism.truncation.cap - size
    cut = float(binom.sf(room, others, mechanism.sampling_rate)) if others >= 0 else 1.0
    if cut <= _NEGLIGIBLE:
        cut_step = _pair(GridLosses(terms.interval, 0, np.zeros(1), 1.0))
    elif terms.view == "told":
        cut_step = _told(mechanism.noise_multiplier, weights, terms.interval)
    else:
        cut_step = _amplified(mechanism.noise_multiplier, 2 * size, 1 - weights[0], terms.interval)
    return cut_step.compute_mixture(sampled, cut)


def _told(noise: float, weights: np.ndarray, interval: float) -> PrivacyLossDistribution:
    """Bound a cut step by telling the whole selection: j of the group are in it, and move the sum by at most j.

    Of the group at most as many are selected as are drawn, so j has no more than the `weights` of the binomial.
    """
    told = _pair(GridLosses(interval, 0, np.ones(1), 0.0))
    told_weight = weights[0]
    for count in np.flatnonzero(weights[1:]) + 1:
        told_weight += weights[count]
        shifted = _against_zero(noise, np.array([count]), np.ones(1), interval)
        told = shifted.compute_mixture(told, min(1.0, weights[count] / told_weight))
    return told


def _amplified(noise: float, shift: int, rate: float, interval: float) -> PrivacyLossDistribution:
    """Bound a cut step by one that keeps the selection secret, but in which a unit also displaces another.

    With probability 1 - rate neither data set's sum holds the group; else the sums differ from that by at most `shift`
    (own and displaced units), and from each other by at most half of it. By advanced joint convexity (Balle, Barthe and
    Gaboardi 2018, arXiv 1807.01647, Theorem 2) both directions have, for ε >= 0, at most the divergence of a Gaussian
    of that shift, subsampled at `rate`; negative losses then follow by symmetry. arXiv 2508.15089 bounds it likewise.
    """
    grid, shifted, centered = _cells(noise, np.array([0, shift]), np.array([1 - rate, rate]), interval)
    probabilities, infinite = _discretized(shifted, centered, grid, interval)
    above = probabilities[grid > 0]
    below = (above * np.exp(-grid[grid > 0] * interval))[::-1]
    middle = max(0.0, 1 - above.sum() - below.sum() - infinite)
    symmetric = np.concatenate((below, [middle], above))
    return _pair(GridLosses(interval, -len(above), symmetric, infinite))


def _pair(losses: GridLosses) -> PrivacyLossDistribution:
    return PrivacyLossDistribution(losses, losses)


def _against_zero(noise: float, shifts: np.ndarray, weights: np.ndarray, interval: float) -> PrivacyLossDistribution:
    """Return the PLD of sum_j weights_j N(shifts_j, noise²) against N(0, noise²), in both directions."""
    grid, mixed, centered = _cells(noise, shifts, weights, interval)
    removed, added = (
        GridLosses(interval, int(points[0]), *_discretized(upper, lower, points, interval))
        for upper, lower, points in ((mixed, centered, grid), (centered[::-1], mixed[::-1], -grid[::-1]))
    )
    return PrivacyLossDistribution(removed, added)


def _cells(
    noise: float, shifts: np.ndarray, weights: np.ndarray, interval: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the grid of losses of the mixture against the centered Gaussian, and both's masses between its points.

    The loss log sum_j weights_j exp((2 shifts_j x - shifts_j²) / (2 noise²)) grows with x, so the cells of the grid
    are intervals of x. n points of the grid make n + 1 masses: the first and the last lie beyond its ends.
    """
    present = weights > 0
    shifts, weights = shifts[present], weights[present]

    def loss(x: float) -> float:
        return float(np.logaddexp.reduce(np.log(weights) + (2 * shifts * x - shifts**2) / (2 * noise**2)))

    first = math.floor(loss(-_TAIL * noise) / interval)
    last = math.ceil(loss(shifts[-1] + _TAIL * noise) / interval)
    grid = np.arange(first, last + 1)
    edges = np.concatenate(([-np.inf], _where_loss_is(grid * interval, noise, shifts, weights), [np.inf]))
    mixed = np.zeros(len(grid) + 1)
    for shift, weight in zip(shifts, weights, strict=True):
        mixed += weight * _normal_masses((edges - shift) / noise)
    return grid, mixed, _normal_masses(edges / noise)


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
        height = np.logaddexp.reduce(terms, axis=0)
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
    tails = ndtr(-np.abs(edges))
    return np.diff(np.where(edges > 0, -tails, tails)) + ((edges[:-1] <= 0) & (edges[1:] > 0))


def _discretized(upper: np.ndarray, lower: np.ndarray, grid: np.ndarray, interval: float) -> tuple[np.ndarray, float]:
    """Return the loss of `upper` against `lower`: its probability at each point of the grid, and of being infinite.

    Of a cell's mass, as much goes to its upper end as keeps the mass of `lower` too. Losses below the grid are raised
    to its first point, losses above it are infinite.
    """
    inside = upper[1:-1]
    raised = np.clip((inside - lower[1:-1] * np.exp(grid[:-1] * interval)) / -np.expm1(-interval), 0.0, inside)
    probabilities = np.zeros(len(grid))
    probabilities[1:] += raised
    probabilities[:-1] += inside - raised
    probabilities[0] += upper[0]
    return probabilities, float(upper[-1])
