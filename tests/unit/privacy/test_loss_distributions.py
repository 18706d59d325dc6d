"""Loss distributions against the library's own, and against sampled sums small enough to be enumerated."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as library
from scipy.special import logsumexp
from scipy.stats import norm

from privacy.loss_distributions import COARSEST_GRID, CutView, _one_step, _Terms, epsilon_on_grid, pld_epsilon
from privacy.mechanisms import SubsampledGaussian, Truncation
from privacy.renyi import order_costs


@pytest.mark.parametrize(("rate", "noise"), [(0.01, 1.0), (0.3, 0.6), (1e-4, 0.8), (0.05, 3.0)])
def test_one_unit_is_what_the_library_builds_point_by_point(rate: float, noise: float) -> None:
    ours = epsilon_on_grid((SubsampledGaussian(rate, noise, 50),), 1e-6, 1e-3)
    theirs = library.from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=1e-3)
    assert ours == pytest.approx(theirs.self_compose(50).get_epsilon_for_delta(1e-6), rel=1e-7)


def test_a_group_is_what_the_library_builds_point_by_point() -> None:
    sensitivities, probabilities = [0.0, 1.0, 2.0], [0.81, 0.18, 0.01]
    theirs = library.from_mixture_gaussian_mechanism(
        1.5, sensitivities, probabilities, value_discretization_interval=0.01
    )
    ours = epsilon_on_grid((SubsampledGaussian(0.1, 1.5, 20),), 1e-6, 0.01, group_size=2)
    assert ours == pytest.approx(theirs.self_compose(20).get_epsilon_for_delta(1e-6), rel=1e-7)


def selections(rate: float, slots: int, cap: int) -> dict[tuple[int, ...], float]:
    """The probability of every selection: Poisson sampling, then a cut to a uniformly random `cap` of the drawn."""
    probabilities: dict[tuple[int, ...], float] = {}
    for flags in product((False, True), repeat=slots):
        drawn = tuple(slot for slot, flag in enumerate(flags) if flag)
        chance = rate ** len(drawn) * (1 - rate) ** (slots - len(drawn))
        kept = list(combinations(drawn, min(cap, len(drawn))))
        for selection in kept:
            probabilities[selection] = probabilities.get(selection, 0.0) + chance / len(kept)
    return probabilities


def neighbors(rate: float, slots: int, cap: int, group: int, noise: float, x: np.ndarray) -> list[np.ndarray]:
    """Densities of the noised sum: the first `group` slots hold 1 or are emptied, the others hold -1 (the worst)."""
    densities = []
    for held in (1.0, 0.0):
        values = np.array([held] * group + [-1.0] * (slots - group))
        chances = selections(rate, slots, cap).items()
        densities.append(sum(p * norm.pdf(x, values[list(s)].sum(), noise) for s, p in chances))
    return densities


@pytest.mark.parametrize("view", ["told", "amplified"])
@pytest.mark.parametrize(
    ("rate", "slots", "cap", "group", "noise"),
    [(0.3, 5, 2, 1, 1.0), (0.5, 4, 1, 1, 0.7), (0.9, 4, 2, 1, 1.5), (0.3, 5, 2, 2, 1.0), (0.6, 4, 3, 3, 1.5)],
)
def test_no_enumerated_cut_batch_loses_more(
    view: CutView, rate: float, slots: int, cap: int, group: int, noise: float
) -> None:
    x = np.linspace(-12, 12, 6_001)
    full, emptied = neighbors(rate, slots, cap, group, noise, x)
    step = SubsampledGaussian(rate, noise, 1, Truncation(slots, cap))
    pair = _one_step(step, _Terms(group, 1e-3, view))
    for epsilon in (0.0, 0.1, 0.5, 1.0, 2.0, 4.0):
        bound = pair.get_delta_for_epsilon(epsilon)
        for upper, lower in ((full, emptied), (emptied, full)):
            exact = np.maximum(upper - math.exp(epsilon) * lower, 0).sum() * (x[1] - x[0])
            assert exact <= bound + 1e-9
    orders = [2, 3, 8]
    for order, cost in zip(orders, order_costs([step], orders), strict=True):
        if group == 1:
            for upper, lower in ((full, emptied), (emptied, full)):
                log_moment = logsumexp(order * np.log(upper) + (1 - order) * np.log(lower)) + math.log(x[1] - x[0])
                assert log_moment / (order - 1) <= cost + 1e-9


def test_without_the_cut_s_price_the_enumeration_would_object() -> None:
    """The comparison can fail: the price of the uncut sampling is below what the cut one loses."""
    x = np.linspace(-12, 12, 6_001)
    full, emptied = neighbors(0.5, 4, 1, 1, 0.7, x)
    uncut = _one_step(SubsampledGaussian(0.5, 0.7, 1), _Terms(1, 1e-3, "told"))
    exact = np.maximum(emptied - math.exp(4.0) * full, 0).sum() * (x[1] - x[0])
    other = np.maximum(full - math.exp(4.0) * emptied, 0).sum() * (x[1] - x[0])
    assert max(exact, other) > 1.1 * uncut.get_delta_for_epsilon(4.0)


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "slots", "cap"),
    [
        (0.01, 1.0, 1000, 800, 24),
        (0.01, 0.8, 10_000, 3200, 64),
        (0.05, 0.8, 100, 160, 16),
        (0.001, 2.0, 3000, 4000, 12),
    ],
)
def test_a_cut_costs_no_more_than_the_library_says(rate: float, noise: float, steps: int, slots: int, cap: int) -> None:
    """Two bounds of our own against arXiv 2508.15089's: the smaller is within half a percent of it, or below."""
    theirs = library.from_truncated_subsampled_gaussian_mechanism(
        slots, rate, cap, noise, value_discretization_interval=1e-3
    )
    ours = pld_epsilon((SubsampledGaussian(rate, noise, steps, Truncation(slots, cap)),), 1e-5)
    assert ours <= 1.005 * theirs.self_compose(steps).get_epsilon_for_delta(1e-5)
    assert ours >= pld_epsilon((SubsampledGaussian(rate, noise, steps),), 1e-5) * 0.999


def test_a_cut_too_rare_to_be_seen_is_booked_all_the_same() -> None:
    """A probability below 1e-16 per step becomes an infinite loss: a δ below it can be promised by no ε."""
    step = (SubsampledGaussian(0.01, 1.0, 10, Truncation(1000, 40)),)
    assert 0 < epsilon_on_grid(step, 1e-6, COARSEST_GRID) < 3
    assert epsilon_on_grid(step, 1e-18, COARSEST_GRID) == math.inf


def test_a_fine_grid_is_used_where_a_coarse_one_is_loose() -> None:
    """Rate 1e-4, noise 0.8, 4000 steps: a grid of 1e-3 overstates ε by 43 percent."""
    mechanism = (SubsampledGaussian(1e-4, 0.8, 4000),)
    ours = pld_epsilon(mechanism, 1e-6)
    assert epsilon_on_grid(mechanism, 1e-6, 1e-3) > 1.4 * ours
    finer = epsilon_on_grid(mechanism, 1e-6, 2e-5)
    assert finer * 0.999 <= ours <= 1.005 * finer


def test_a_long_history_composes_in_remembered_halves() -> None:
    history = tuple(SubsampledGaussian(0.01 + i * 1e-3, 2.0, 1 + i % 3) for i in range(11))
    alone = [epsilon_on_grid(history[:length], 1e-5, COARSEST_GRID) for length in (7, 8, 9, 11)]
    assert alone == sorted(alone)
    pairs = [
        library.from_gaussian_mechanism(
            2.0, sampling_prob=m.sampling_rate, value_discretization_interval=4e-3
        ).self_compose(m.steps)
        for m in history
    ]
    total = pairs[0]
    for pair in pairs[1:]:
        total = total.compose(pair)
    assert alone[-1] == pytest.approx(total.get_epsilon_for_delta(1e-5), rel=1e-6)
