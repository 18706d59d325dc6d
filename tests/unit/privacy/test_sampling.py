"""Poisson sampling."""

import numpy as np
import pytest

from privacy.mechanisms import Truncation
from privacy.randomness import SecureStream
from privacy.sampling import PoissonSampling
from protocol.errors import PrivacyError


def draws(rate: float, records: int, times: int) -> np.ndarray:
    stream, sampling = SecureStream.insecure(1, "sampling"), PoissonSampling(rate, records)
    drawn = np.zeros((times, records), dtype=bool)
    for row in drawn:
        row[sampling.draw(records, stream)] = True
    return drawn


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.97])
def test_each_record_is_drawn_alone_at_the_rate(rate: float) -> None:
    """Five standard errors per figure: with a free seed this would fail about once in a hundred thousand runs."""
    records, times = 200, 3000
    drawn = draws(rate, records, times)
    variance = rate * (1 - rate)
    assert abs(drawn.mean() - rate) < 5 * (variance / drawn.size) ** 0.5
    assert np.abs(drawn.mean(axis=0) - rate).max() < 5 * (variance / times) ** 0.5
    # A binomial count: a sampler of fixed batch size would have no variance, one drawn as a block far too much.
    sizes = drawn.sum(axis=1)
    assert sizes.var() == pytest.approx(records * variance, rel=5 * (2 / times) ** 0.5)
    # Neighbors, and a record with itself one step later, are independent.
    for left, right in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        covariance = ((left - rate) * (right - rate)).mean()
        assert abs(covariance) < 5 * variance / left.size**0.5


def test_positions_are_ascending_distinct_and_in_range() -> None:
    stream = SecureStream.insecure(2)
    for _ in range(50):
        positions = PoissonSampling(0.4, 30).draw(30, stream)
        assert positions == sorted(set(positions))
        assert set(positions) <= set(range(30))
        assert all(type(position) is int for position in positions)


def test_an_empty_draw_is_possible() -> None:
    empty = sum(not row.any() for row in draws(0.1, 20, 2000)) / 2000
    assert empty == pytest.approx(0.9**20, abs=5 * (0.1216 * 0.8784 / 2000) ** 0.5)
    assert PoissonSampling(1e-12, 100).draw(100, SecureStream.insecure(0)) == []
    assert PoissonSampling(0.5, 100).draw(0, SecureStream.insecure(0)) == []


def test_rate_one_draws_everything() -> None:
    assert PoissonSampling(1.0, 50).draw(50, SecureStream.insecure(0)) == list(range(50))


@pytest.mark.parametrize(("rate", "shown"), [(1.28, r"1\.28"), (0.0, "0"), (-0.5, r"-0\.5"), (float("nan"), "nan")])
def test_a_rate_outside_its_range_is_refused(rate: float, shown: str) -> None:
    message = rf"the sampling rate is {shown}, it must lie in \(0, 1\]: expected_batch_size must not exceed the site's"
    with pytest.raises(PrivacyError, match=message):
        PoissonSampling(rate, 100)


def test_a_cut_draw_is_a_uniformly_random_subset_of_the_drawn_slots() -> None:
    """Empty slots take part in the cut: 20 units in 40 slots, of which every draw keeps 10."""
    stream, sampling = SecureStream.insecure(3), PoissonSampling(1.0, 40, cap=10)
    times = 4000
    drawn = np.zeros((times, 20), dtype=bool)
    for row in drawn:
        row[sampling.draw(20, stream)] = True
    assert np.abs(drawn.mean(axis=0) - 0.25).max() < 5 * (0.25 * 0.75 / times) ** 0.5
    # Hypergeometric: 10 of 40 slots, 20 of which are filled.
    assert drawn.sum(axis=1).mean() == pytest.approx(5.0, abs=5 * (10 * 0.5 * 0.5 * 30 / 39 / times) ** 0.5)


def test_no_draw_exceeds_the_cap_and_units_beyond_the_slots_are_never_drawn() -> None:
    stream = SecureStream.insecure(4)
    for _ in range(200):
        positions = PoissonSampling(0.9, 50, cap=20).draw(80, stream)
        assert len(positions) == 20
        assert positions == sorted(positions)
        assert positions[-1] < 50


def test_a_cap_that_cannot_bind_is_no_truncation() -> None:
    assert PoissonSampling(0.5, 10, cap=10).truncation is None
    assert PoissonSampling(0.5, 10, cap=9).truncation == Truncation(10, 9)
