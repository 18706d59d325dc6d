"""Rényi differential privacy of the same mechanisms: for discrete noise, for adaptive choices, and as a second opinion.

Rényi costs add up over steps at each order, also when the steps are chosen after seeing earlier outputs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import minimize_scalar
from scipy.stats import binom

from privacy.mechanisms import SubsampledGaussian

__all__ = [
    "ORDERS",
    "conversion",
    "order_costs",
    "renyi_epsilon",
    "renyi_over_sites",
    "renyi_selection_epsilon",
    "zcdp_epsilon",
]

# An order at which the library's series does not converge costs infinity there, which is safe and no news.
logging.getLogger("absl").addFilter(lambda record: "_compute_log_a_frac" not in str(record.msg))

_INTEGERS = (*range(2, 65), 96, 128, 192, 256, 512, 1024)
ORDERS = tuple(sorted({*_INTEGERS, *(1 + tenths / 10 for tenths in range(1, 100))}))
"""The orders at which costs are looked at; one order is enough for a valid ε, more make it smaller."""


def conversion(order: float | np.ndarray, delta: float) -> np.ndarray:
    """Return what to add to a Rényi cost at `order` to obtain ε at `delta`.

    log(1 - 1/α) - log(δα) / (α - 1): Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), Proposition 12; Balle et al.
    2020 (arXiv 1905.09982), Theorem 21.
    """
    order = np.asarray(order, dtype=float)
    return np.log1p(-1 / order) - np.log(delta * order) / (order - 1)


def order_costs(mechanisms: Iterable[SubsampledGaussian], orders: Sequence[float], group_size: int = 1) -> np.ndarray:
    """Return the Rényi cost of the composition at each of `orders`, for groups of `group_size` units.

    A group of at most 2^c units costs 3^c times what one unit costs at 2^c times the order (Mironov 2017, arXiv
    1702.07476, Proposition 2), for orders of at least 2.
    """
    doublings = (group_size - 1).bit_length()
    scaled = tuple(order * 2**doublings for order in orders)
    total = np.zeros(len(orders))
    for mechanism in mechanisms:
        if mechanism.steps:
            total += mechanism.steps * _one_step(replace(mechanism, steps=1), scaled)
    if doublings:
        total = np.where(np.asarray(orders) >= 2, 3.0**doublings * total, math.inf)
    return total


def renyi_epsilon(mechanisms: Iterable[SubsampledGaussian], delta: float, group_size: int = 1) -> float:
    """Return ε of the composition by its best order: an upper bound, 8 to 69 percent above the exact one."""
    orders = ORDERS if group_size == 1 else _INTEGERS[:63]
    return _best(order_costs(mechanisms, orders, group_size), orders, delta)


def renyi_over_sites(sites: Sequence[Sequence[SubsampledGaussian]], delta: float, overlap: int) -> float:
    """Return an ε that no composition of `overlap` of the sites exceeds: at each order, the largest costs are added."""
    costs = np.sort([order_costs(site, ORDERS) for site in sites], axis=0)
    return _best(costs[-overlap:].sum(axis=0), ORDERS, delta)


def renyi_selection_epsilon(runs: Sequence[Sequence[SubsampledGaussian]], delta: float, mean_trials: float) -> float:
    """Return ε of running one of `runs`, drawn at random, Poisson(`mean_trials`) times and keeping the best alone.

    Papernot and Steinke 2022 (arXiv 2110.03620), Theorem 6: at order α the cost ε(α) grows by
    mean · δ(log(1 + 1/(α-1))) + log(mean) / (α - 1), δ(·) being what the single run promises at that ε.
    """
    orders = np.asarray(ORDERS)
    costs = np.max([order_costs(run, ORDERS) for run in runs], axis=0)
    single = np.log1p(1 / (orders - 1))
    log_deltas = (orders - 1) * (costs - single[:, None] + np.log1p(-1 / orders)) - np.log(orders)
    deltas = np.exp(np.minimum(log_deltas.min(axis=1), 0.0))
    return _best(costs + mean_trials * deltas + math.log(mean_trials) / (orders - 1), ORDERS, delta)


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Return ε of ρ-zCDP, cost ρα at every real order α > 1, by the best order."""
    if rho == 0:
        return 0.0
    best = minimize_scalar(
        lambda log_excess: float(rho * (1 + math.exp(log_excess)) + conversion(1 + math.exp(log_excess), delta)),
        bounds=(-12.0, 25.0),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return max(0.0, float(best.fun))


def _best(costs: np.ndarray, orders: Sequence[float], delta: float) -> float:
    if not costs.any():
        return 0.0
    return max(0.0, float(np.min(costs + conversion(np.asarray(orders), delta))))


@lru_cache(maxsize=4096)
def _one_step(mechanism: SubsampledGaussian, orders: tuple[float, ...]) -> np.ndarray:
    """Return the cost of one step at each order.

    Poisson sampling: Mironov, Talwar and Zhang 2019 (arXiv 1908.10530), through `dp_accounting`.

    Discrete Gaussian noise, moved by an integer vector: at integer orders each term of their binomial sum, the moment
    of order j of N(x, σ²) against N(0, σ²), is exp(j(j-1) |x|² / (2 σ²)) for the discrete Gaussian exactly as for the
    continuous one (the grid is shifted by the integer jx), and a reflection swaps the two, which is all that their
    comparison of the two directions needs. Other orders are rounded up to an integer. Unsampled it costs α / (2 σ²) at
    every order (arXiv 2004.00010, Proposition 5).

    A cut: with the probability that the others' draw leaves no room for the unit, either the whole selection may be
    told, in which the unit is with a probability of at most the rate; or the unit, if drawn, also displaces another:
    the sums differ by twice the sensitivity from what they are without it, and in the denominator of the divergence
    that part alone is counted, (1 - rate) times. Moments mix (joint convexity); the smaller bound is taken.
    """
    rate, noise = mechanism.sampling_rate, mechanism.noise_multiplier
    if noise == 0:
        return np.full(len(orders), math.inf)
    at = np.asarray(orders, dtype=float)
    if mechanism.discrete and rate < 1:
        at = np.ceil(at)
    costs = _sampled_gaussian(rate, noise, at)
    if mechanism.truncation is None or rate == 1:
        return costs
    cut = float(binom.sf(mechanism.truncation.cap - 1, mechanism.truncation.slots - 1, rate))
    if cut == 0:
        return costs
    told = np.logaddexp(math.log1p(-rate), math.log(rate) + at * (at - 1) / (2 * noise**2))
    displacing = (at - 1) * (_sampled_gaussian(rate, noise / 2, at) - math.log1p(-rate))
    fitting = math.log1p(-cut) + (at - 1) * costs if cut < 1 else np.full(len(at), -math.inf)
    return np.logaddexp(fitting, math.log(cut) + np.minimum(told, displacing)) / (at - 1)


def _sampled_gaussian(rate: float, noise: float, orders: np.ndarray) -> np.ndarray:
    accountant = RdpAccountant([int(order) if order.is_integer() else order for order in orders.tolist()])
    return accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise))).rdp
