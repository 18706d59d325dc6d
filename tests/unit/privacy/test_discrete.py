"""The discrete Gaussian, and sums of integers that it protects."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privacy.discrete import MAX_SCALE, DiscreteNoise, _below, _bernoulli_exp, discrete_gaussian
from privacy.randomness import SecureStream
from protocol.errors import PrivacyError

RARELY = 1e-6
"""Error rate of each statistical test here, were the seed free; the seeds are fixed, so a pass repeats."""


@pytest.mark.parametrize("scale", [1, 2, 7])
def test_the_sampler_has_the_exact_probabilities(scale: int) -> None:
    count = 200_000
    drawn = discrete_gaussian(scale, count, SecureStream.insecure(0, scale))
    reach = 4 * scale
    support = np.arange(-40 * scale, 40 * scale + 1)
    weights = np.exp(-(support**2) / (2 * scale**2))
    inside = np.abs(support) <= reach
    expected = count * np.append(weights[inside], weights[~inside].sum()) / weights.sum()
    observed = [(drawn == value).sum() for value in support[inside]]
    assert stats.chisquare([*observed, count - sum(observed)], expected).pvalue > RARELY


def test_at_the_largest_scale_it_is_a_gaussian_to_the_last_bit() -> None:
    drawn = discrete_gaussian(MAX_SCALE, 100_000, SecureStream.insecure(1))
    assert drawn.dtype == np.int64
    assert stats.kstest(drawn / MAX_SCALE, "norm").pvalue > RARELY
    assert stats.chisquare(np.bincount(drawn % 64, minlength=64)).pvalue > RARELY


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 3), (1, 3), (3, 3), (7, 3), (1, 2 * MAX_SCALE**2)])
def test_a_decision_is_true_with_probability_exp(numerator: int, denominator: int) -> None:
    count = 100_000
    trues = _bernoulli_exp(np.full(count, numerator), denominator, SecureStream.insecure(2)).sum()
    assert stats.binomtest(int(trues), count, math.exp(-numerator / denominator)).pvalue > RARELY


def test_integers_are_uniform_where_remainders_of_words_are_not() -> None:
    """Of 2^64 words, remainders modulo 3 · 2^61 favor the smaller two thirds by half again."""
    bound = 3 << 61
    thirds = _below(bound, 90_000, SecureStream.insecure(3)) // (1 << 61)
    assert stats.chisquare(np.bincount(thirds, minlength=3)).pvalue > RARELY


@pytest.mark.parametrize("scale", [0, MAX_SCALE + 1])
def test_a_scale_beyond_64_bits_is_refused(scale: int) -> None:
    with pytest.raises(PrivacyError, match=rf"scale is {scale}, it must lie in \[1, {MAX_SCALE}\]"):
        discrete_gaussian(scale, 1, SecureStream.insecure(0))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    units=st.integers(1, 5),
    dimension=st.integers(1, 400),
    sensitivity=st.floats(1e-6, 1e6),
    multiplier=st.floats(0.2, 1000),
    magnitude=st.floats(1e-3, 1e6),
    corner=st.booleans(),
)
def test_one_unit_moves_the_integer_sum_by_at_most_the_sensitivity(
    seed: int, units: int, dimension: int, sensitivity: float, multiplier: float, magnitude: float, corner: bool
) -> None:
    """Over two parameters together, for rows of any length; corners are the rows that rounding lengthens most."""
    noise = DiscreteNoise(multiplier, sensitivity, dimension)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(units, dimension, generator=generator) * magnitude * sensitivity
    if corner:
        rows[-1] = (noise.granularity * 1.001) * (torch.randint(0, 100, (dimension,), generator=generator) + 0.5)
    factors = (noise.clip_norm / rows.double().norm(dim=1)).clamp(max=1).float()
    cut = dimension // 3
    sums = [
        torch.cat([noise.fold(rows[:kept, :cut], factors[:kept]), noise.fold(rows[:kept, cut:], factors[:kept])])
        for kept in (units, units - 1)
    ]
    moved = sum(int(entry) ** 2 for entry in sums[0] - sums[1])
    limit = sensitivity / noise.granularity
    assert moved <= limit**2
    # The noise is scaled to the same bound, and never below it.
    assert noise.scale >= multiplier * limit


def test_rows_without_room_for_rounding_would_break_the_bound() -> None:
    """Why `clip_norm` is smaller than the sensitivity: a row whose entries all round up."""
    noise = DiscreteNoise(1.0, 1.0, 10_000)
    row = torch.full((1, 10_000), noise.granularity * 163.501)
    too_much = (1.0 / row.norm(dim=1)).clamp(max=1)
    assert float(noise.fold(row, too_much).double().norm()) > noise.sensitivity / noise.granularity
    enough = (noise.clip_norm / row.norm(dim=1)).clamp(max=1)
    assert float(noise.fold(row, enough).double().norm()) <= noise.sensitivity / noise.granularity


@pytest.mark.parametrize(("dimension", "multiplier"), [(1, 0.2), (1_000_000, 1.0), (40_000_000, 26.0)])
def test_rounding_costs_less_than_a_percent(dimension: int, multiplier: float) -> None:
    noise = DiscreteNoise(multiplier, 0.3, dimension)
    assert 0.99 * 0.3 < noise.clip_norm < 0.3
    assert noise.scale <= MAX_SCALE
    assert noise.standard_deviation == pytest.approx(multiplier * 0.3, rel=0.01)
    assert noise.standard_deviation >= multiplier * 0.3


def test_the_noised_sum_is_on_the_grid_with_the_right_deviation() -> None:
    noise = DiscreteNoise(1.3, 0.25, 60_000)
    parameter = torch.zeros(300, 200, dtype=torch.bfloat16)
    total = noise.zeros(parameter)
    assert total.dtype == torch.int64
    rows = torch.full((2, 60_000), 0.0005)
    total += noise.fold(rows, torch.ones(2)).view_as(total)
    (noised,) = noise.add((total,), SecureStream.insecure(5))
    assert (noised.shape, noised.dtype) == (parameter.shape, torch.float32)
    steps = noised.double() / noise.granularity
    assert torch.equal(steps, steps.round())
    standardized = ((noised.double() - 0.001) / noise.standard_deviation).flatten().numpy()
    squares = stats.chi2(standardized.size)
    assert squares.ppf(RARELY / 2) < (standardized**2).sum() < squares.isf(RARELY / 2)


def test_the_sum_is_exact_and_does_not_depend_on_the_order() -> None:
    noise = DiscreteNoise(1.0, 1.0, 50)
    rows = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    factors = noise.clip_norm / rows.norm(dim=1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    halves = noise.fold(rows[order[:90]], factors[order[:90]]) + noise.fold(rows[order[90:]], factors[order[90:]])
    assert torch.equal(noise.fold(rows, factors), halves)


@pytest.mark.parametrize("value", [1.1, float("nan"), float("inf")])
def test_rows_that_were_not_clipped_are_refused(value: float) -> None:
    with pytest.raises(
        PrivacyError, match=r"an entry above the sensitivity of 1, or NaN: clip rows to clip_norm=0\.99"
    ):
        DiscreteNoise(1.0, 1.0, 2).fold(torch.tensor([[0.1, value]]), torch.ones(1))


def test_a_sum_of_floats_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"a sum of torch\.float32 is not counted in grid steps: make it with zeros"):
        DiscreteNoise(1.0, 1.0, 2).add((torch.zeros(2),), SecureStream.insecure(0))


@pytest.mark.parametrize("arguments", [(0.0, 1.0, 5), (1.0, 0.0, 5), (1.0, math.inf, 5), (math.nan, 1.0, 5), (1, 1, 0)])
def test_no_noise_is_no_discrete_noise(arguments: tuple[float, float, int]) -> None:
    with pytest.raises(PrivacyError, match="is no noise: multiplier and sensitivity must be positive, dimension at"):
        DiscreteNoise(*arguments)


def test_a_grid_coarser_than_the_sensitivity_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"rounding to the grid of .* costs more than the sensitivity; lower the"):
        DiscreteNoise(1000.0, 1.0, 10**10)
