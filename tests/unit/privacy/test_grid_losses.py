"""The two operations of ours against the library's, and in the far tail against distributions known exactly."""

import math

import numpy as np
import pytest
from dp_accounting.pld.pld_pmf import DensePLDPmf
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from privacy.grid_losses import GridLosses
from privacy.loss_distributions import pld_epsilon
from privacy.mechanisms import SubsampledGaussian


def step(rate: float, noise: float, interval: float) -> GridLosses:
    theirs = from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=interval)
    dense = theirs._pmf_remove.to_dense_pmf()
    return GridLosses(interval, dense._lower_loss, dense._probs, dense._infinity_mass)


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "interval"),
    [
        (0.01, 0.6, 1000, 1e-3),
        (0.3, 3.0, 10, 4e-3),
        (0.5, 0.5, 2, 4e-3),
        (1e-3, 0.8, 10_000, 2.5e-4),
        (1e-4, 0.6, 50_000, 2.5e-4),
        (0.02, 1000.0, 100_000, 4e-3),
    ],
)
def test_many_steps_cost_what_the_library_says(rate: float, noise: float, steps: int, interval: float) -> None:
    once = step(rate, noise, interval)
    ours, theirs = once.self_compose(steps), DensePLDPmf.self_compose(once, steps)
    assert ours.size <= theirs.size
    for delta in (1e-3, 1e-5, 1e-6):
        expected = DensePLDPmf.get_epsilon_for_delta(theirs, delta)
        assert ours.get_epsilon_for_delta(delta) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@settings(max_examples=150)
@given(
    log_rate=st.floats(-7, -0.01),
    noise=st.floats(0.2, 3.0),
    steps=st.integers(2, 300),
    delta=st.sampled_from([1e-4, 1e-6, 1e-8]),
)
def test_few_steps_of_any_rate_cost_what_the_library_says(
    log_rate: float, noise: float, steps: int, delta: float
) -> None:
    """Rare losses that are huge: the orders that bound their tail span many powers of ten."""
    once = step(10**log_rate, noise, 8e-3)
    ours, theirs = once.self_compose(steps), DensePLDPmf.self_compose(once, steps)
    assert ours._probs.sum() + ours._infinity_mass == pytest.approx(1, abs=1e-9)
    assert ours.size <= 1.5 * theirs.size
    expected = DensePLDPmf.get_epsilon_for_delta(theirs, delta)
    assert ours.get_epsilon_for_delta(delta) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta", "epsilon"),
    [
        (1e-5, 0.4638, 2, 1e-6, 0.0016973),
        (1e-5, 0.4638, 8, 1e-6, 0.0064969),
        (1e-6, 0.4022, 100, 1e-7, 0.0247701),
    ],
)
def test_the_first_steps_of_a_long_run_can_be_priced(
    rate: float, noise: float, steps: int, delta: float, epsilon: float
) -> None:
    """Golden: dp-accounting 0.6's own composition on the same grids."""
    assert pld_epsilon((SubsampledGaussian(rate, noise, steps),), delta) == pytest.approx(epsilon, rel=1e-4)


def test_what_cannot_be_composed() -> None:
    once = GridLosses(0.1, 0, np.array([0.5, 0.5]), 0.0)
    with pytest.raises(ValueError, match="num_times=0: compose one loss at least"):
        once.self_compose(0)
    for mass, times in ((0.9, 400), (1.0, 3), (0.999999, 5)):
        rare = GridLosses(0.1, 0, np.array([1 - mass]), mass)
        assert rare.self_compose(times).get_epsilon_for_delta(0.5) == math.inf
    padded = GridLosses(0.1, 0, np.array([0.5, 0.5] + [0.0] * 3000), 0.0)
    expected = DensePLDPmf.get_epsilon_for_delta(DensePLDPmf.self_compose(padded, 10), 1e-3)
    assert padded.self_compose(10).get_epsilon_for_delta(1e-3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("chance", "times"), [(0.5, 1000), (1e-3, 10_000), (1e-4, 100_000), (1e-5, 1_000_000)])
def test_the_far_tail_is_precise(chance: float, times: int) -> None:
    """A loss of one cell, rarely: the sum is binomial. The library's own error is above the smallest tails here."""
    once = GridLosses(1.0, 0, np.array([1 - chance, chance]), 0.0)
    sums = once.self_compose(times)
    theirs = DensePLDPmf.self_compose(once, times)
    worst, worst_of_theirs = 0.0, 0.0
    for tail in (1e-3, 1e-6, 1e-9, 1e-12):
        k = int(binom.isf(tail, times, chance))
        exact = binom.sf(k - 1, times, chance)
        for losses in (sums, theirs):
            error = abs(losses._probs[k - losses._lower_loss :].sum() / exact - 1)
            if losses is sums:
                worst = max(worst, error)
            else:
                worst_of_theirs = max(worst_of_theirs, error)
    assert worst < 2e-3  # of which 1e-3 is what was left out: 1e-15 of 1e-12
    assert worst_of_theirs > worst


@given(
    masses=st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(lambda masses: sum(masses) > 1e-3),
    first=st.integers(-60, 60),
    interval=st.sampled_from([1e-3, 0.1, 1.0, 5.0]),
    infinite=st.sampled_from([0.0, 1e-9, 1e-3]),
    delta=st.sampled_from([1e-12, 1e-6, 1e-3, 0.1, 0.9]),
)
def test_epsilon_is_the_library_s(
    masses: list[float], first: int, interval: float, infinite: float, delta: float
) -> None:
    probabilities = np.array(masses) / sum(masses) * (1 - infinite)
    losses = GridLosses(interval, first, probabilities, infinite)
    expected = DensePLDPmf.get_epsilon_for_delta(losses, delta)
    assert losses.get_epsilon_for_delta(delta) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_losses_whose_exponential_is_nothing() -> None:
    losses = GridLosses(1.0, 800, np.array([0.5, 0.5]), 0.0)
    assert losses.get_epsilon_for_delta(1e-5) == DensePLDPmf.get_epsilon_for_delta(losses, 1e-5) == 801


def test_an_infinite_loss_above_delta_has_no_epsilon() -> None:
    assert GridLosses(0.1, 0, np.array([0.9]), 0.1).get_epsilon_for_delta(1e-2) == math.inf


def test_what_is_left_out_is_booked_as_infinite() -> None:
    once = GridLosses(0.1, -1, np.array([0.6, 0.2, 0.2 - 1e-9]), 1e-9)
    sums = once.self_compose(500)
    assert sums._infinity_mass >= 1 - (1 - 1e-9) ** 500
    assert sums._probs.sum() + sums._infinity_mass >= 1 - 1e-12


def test_mixtures_and_sums_of_different_losses_stay_ours() -> None:
    """What comes out of the library's operations composes further by these."""
    once, other = step(0.1, 1.0, 1e-2), step(0.2, 2.0, 1e-2)
    assert isinstance(once.compute_mixture(other, 0.3), GridLosses)
    both = once.compose(other)
    assert isinstance(both, GridLosses)
    expected = DensePLDPmf.compose(once, other)
    assert both.get_epsilon_for_delta(1e-5) == pytest.approx(expected.get_epsilon_for_delta(1e-5), rel=1e-9)
