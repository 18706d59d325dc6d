"""Streamed noise is what its factorization says, exactly: fed with unit vectors, a stream spells out its matrix."""

from collections.abc import Callable

import numpy as np
import pytest

from privacy.correlated.blt import BufferedToeplitz, optimal_blt
from privacy.correlated.build import INDEPENDENT
from privacy.correlated.factorization import Factorization
from privacy.correlated.participation import Participation
from privacy.correlated.toeplitz import BandedToeplitz, square_root
from privacy.correlated.tree import TreeAggregation

ROUNDS = 21
FACTORIZATIONS: list[Factorization] = [
    INDEPENDENT,
    BandedToeplitz(square_root(4)),
    BufferedToeplitz((0.2, 0.15, 0.1), (0.95, 0.7, 0.2)),
    TreeAggregation(),
]
every = pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=lambda f: type(f).__name__)


def unit_vectors(size: int) -> Callable[[], np.ndarray]:
    """Each draw is the next unit vector, so that linear combinations of draws can be read off."""
    drawn = iter(np.eye(size))
    return lambda: next(drawn)


def noise_matrix(factorization: Factorization, rounds: int = ROUNDS) -> np.ndarray:
    """Row t holds the weights of all draws in round t's noise. What a stream hands out may be overwritten."""
    noise, draw, rows = factorization.start(), unit_vectors(2 * rounds), np.empty((rounds, 2 * rounds))
    for row in rows:
        handed_out = noise.next(draw)
        row[:] = handed_out
        handed_out[:] = np.nan
    return rows


@every
def test_prefix_variances_are_those_of_the_stream(factorization: Factorization) -> None:
    prefixes = np.cumsum(noise_matrix(factorization), axis=0)
    np.testing.assert_allclose((prefixes**2).sum(axis=1), factorization.prefix_variances(ROUNDS), rtol=1e-10)


@pytest.mark.parametrize("factorization", FACTORIZATIONS[:3], ids=lambda f: type(f).__name__)
def test_toeplitz_streams_invert_their_matrix(factorization: Factorization) -> None:
    if isinstance(factorization, BufferedToeplitz):
        column = factorization.coefficients(ROUNDS)
    else:
        assert isinstance(factorization, BandedToeplitz)
        column = np.zeros(ROUNDS)
        column[: len(factorization.coefficients)] = factorization.coefficients
    strategy = np.array([[column[t - s] if t >= s else 0.0 for s in range(ROUNDS)] for t in range(ROUNDS)])
    np.testing.assert_allclose(strategy @ noise_matrix(factorization)[:, :ROUNDS], np.eye(ROUNDS), atol=1e-12)


def test_the_tree_reads_prefixes_off_its_nodes() -> None:
    """A prefix' noise B z comes with the exact prefix: B C x = A x, where z is drawn node by node as they complete."""
    rounds = 13
    nodes = [
        (start, start + (1 << level))
        for end in range(1, rounds + 1)
        for level in range(rounds.bit_length())
        if end % (1 << level) == 0
        for start in [end - (1 << level)]
    ]
    strategy = np.array([[float(start <= r < stop) for r in range(rounds)] for start, stop in nodes])
    decoder = np.cumsum(noise_matrix(TreeAggregation(), rounds), axis=0)[:, : len(nodes)]
    np.testing.assert_allclose(decoder @ strategy, np.tril(np.ones((rounds, rounds))), atol=1e-12)


@pytest.mark.parametrize("limits", [Participation(64, 16, 4), Participation(512, 64, 8)], ids=str)
def test_correlation_pays_in_the_known_order(limits: Participation) -> None:
    """Root mean squared error of the prefix sums at the same privacy: independent > tree > blt > banded."""

    def error(factorization: Factorization) -> float:
        variances = factorization.prefix_variances(limits.rounds)
        return float(np.sqrt(variances.mean()) * factorization.sensitivity(limits))

    independent, tree = error(INDEPENDENT), error(TreeAggregation())
    blt, banded = error(optimal_blt(2, limits)), error(BandedToeplitz(square_root(limits.min_separation)))
    assert independent > 1.2 * tree > 1.2**2 * blt
    assert banded < blt < 1.06 * banded
    assert error(optimal_blt(3, limits)) <= 1.001 * blt


def test_drawn_vectors_are_left_alone() -> None:
    drawn = np.ones(3)
    for factorization in FACTORIZATIONS:
        noise = factorization.start()
        for _ in range(4):
            noise.next(lambda: drawn)
    np.testing.assert_array_equal(drawn, 1.0)
