"""The sensitivity of a factorization against every participation pattern there is, and against published figures."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from privacy.correlated.blt import BufferedToeplitz, optimal_blt
from privacy.correlated.build import INDEPENDENT
from privacy.correlated.participation import Participation
from privacy.correlated.toeplitz import BandedToeplitz, square_root, toeplitz_sensitivity
from privacy.correlated.tree import TreeAggregation
from protocol.errors import PrivacyError

SMALL = [Participation(n, b, k) for n, b, k in itertools.product((1, 5, 8, 13), (1, 2, 3, 5), (1, 2, 4, 13))]


def patterns(limits: Participation) -> Iterator[tuple[int, ...]]:
    """Every allowed set of rounds, from 0."""
    for count in range(1, limits.max_participations + 1):
        for rounds in itertools.combinations(range(limits.rounds), count):
            if all(later - earlier >= limits.min_separation for earlier, later in itertools.pairwise(rounds)):
                yield rounds


def brute_force(strategy: np.ndarray, limits: Participation) -> float:
    """The worst pattern; all entries are positive, so contributions in one direction are the worst."""
    return max(float(np.linalg.norm(strategy[:, list(rounds)].sum(axis=1))) for rounds in patterns(limits))


def tree_matrix(rounds: int) -> np.ndarray:
    """One row per complete dyadic interval."""
    rows = [
        [float(start <= r < start + size) for r in range(rounds)]
        for size in (1 << level for level in range(rounds.bit_length()))
        for start in range(0, rounds - size + 1, size)
    ]
    return np.array(rows)


def toeplitz_matrix(coefficients: np.ndarray) -> np.ndarray:
    n = len(coefficients)
    return np.array([[coefficients[t - s] if t >= s else 0.0 for s in range(n)] for t in range(n)])


@pytest.mark.parametrize("limits", SMALL, ids=str)
def test_tree_is_exact(limits: Participation) -> None:
    assert TreeAggregation().sensitivity(limits) == pytest.approx(brute_force(tree_matrix(limits.rounds), limits))


@pytest.mark.parametrize("limits", SMALL, ids=str)
def test_toeplitz_is_exact(limits: Participation) -> None:
    for bands in {1, min(limits.min_separation, limits.rounds)}:
        banded = np.zeros(limits.rounds)
        banded[:bands] = square_root(bands)
        found = BandedToeplitz(square_root(bands)).sensitivity(limits)
        assert found == pytest.approx(brute_force(toeplitz_matrix(banded), limits))
    blt = BufferedToeplitz((0.3, 0.2), (0.9, 0.4))
    expected = brute_force(toeplitz_matrix(blt.coefficients(limits.rounds)), limits)
    assert blt.sensitivity(limits) == pytest.approx(expected)


def test_one_direction_is_the_worst() -> None:
    """Random directions per participation never beat the same one (positive C'C)."""
    generator, limits = np.random.default_rng(0), Participation(8, 2, 3)
    strategy = tree_matrix(8)
    bound = TreeAggregation().sensitivity(limits)
    for rounds in patterns(limits):
        directions = generator.normal(size=(8, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        taken = np.zeros((8, 3))
        taken[list(rounds)] = directions[list(rounds)]
        assert np.linalg.norm(strategy @ taken) <= bound + 1e-12


def test_bands_within_the_separation_give_orthogonal_columns() -> None:
    banded = BandedToeplitz(square_root(4))
    column = math.sqrt(sum(value**2 for value in square_root(4)))
    assert banded.sensitivity(Participation(100, 4, 3)) == pytest.approx(math.sqrt(3) * column)
    assert square_root(4) == (1.0, 0.5, 0.375, 0.3125)


def test_gboard_tree() -> None:
    """Spanish next-word model of 2022: z = 7, 2000 rounds, separation 313, six participations; published 0.81 zCDP."""
    squared = TreeAggregation().sensitivity(Participation(2000, 313, 6)) ** 2
    assert squared == pytest.approx(79)
    assert squared / (2 * 7.0**2) == pytest.approx(0.8061, abs=5e-5)


@pytest.mark.parametrize("separation", [1428, 1132])
def test_gboard_banded(separation: int) -> None:
    """Two participations with columns of one norm, z = 8.35; published 0.01434 zCDP.

    In a Toeplitz matrix of 2000 rounds the second column is cut off at the end, so the exact cost is a little less.
    """
    banded = BandedToeplitz(square_root(1000))
    norm = banded.sensitivity(Participation(2000, separation, 1))
    uncut = banded.sensitivity(Participation(separation + 1000, separation, 2)) / norm
    cut = banded.sensitivity(Participation(2000, separation, 2)) / norm
    assert uncut**2 / (2 * 8.35**2) == pytest.approx(0.01434, abs=5e-6)
    assert 0.0139 < cut**2 / (2 * 8.35**2) < 0.01434


def test_independent_noise_adds_up_over_participations() -> None:
    assert INDEPENDENT.sensitivity(Participation(9, 2, 3)) == pytest.approx(math.sqrt(3))


def test_the_best_blt_falls_and_is_known_to_the_theorem() -> None:
    limits = Participation(64, 16, 4)
    coefficients = optimal_blt(3, limits).coefficients(64)
    assert coefficients[0] == 1
    assert np.all(np.diff(coefficients) <= 0)
    assert np.all(coefficients >= 0)


@pytest.mark.parametrize("coefficients", [[1.0, 2.0, 0.5], [1.0, 0.5, -0.1]])
def test_coefficients_outside_the_theorem_are_refused(coefficients: list[float]) -> None:
    with pytest.raises(ValueError, match="coefficients that fall and are not negative"):
        toeplitz_sensitivity(np.array(coefficients), Participation(3, 1, 1))


def test_a_tree_that_would_take_minutes_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"a tree over 20000 rounds with min_separation=500 takes too long"):
        TreeAggregation().sensitivity(Participation(20_000, 500, 40))


def test_a_schedule_that_cannot_be_kept_is_refused_with_the_fix() -> None:
    Participation(8, 2, 4).refuse_impossible(population=4, cohort=2)
    with pytest.raises(PrivacyError, match=r"needs 12 sites: lower privacy.noise.min_separation to 2, or .* to 2"):
        Participation(8, 4, 8).refuse_impossible(population=8, cohort=3)
    with pytest.raises(PrivacyError, match=r"min_separation=9 .* lower privacy.noise.min_separation to 4$"):
        Participation(20, 9, 8).refuse_impossible(population=4, cohort=1)
    with pytest.raises(PrivacyError, match=r"8 rounds of 2 need 16: raise privacy.noise.max_participations to 4"):
        Participation(8, 2, 3).refuse_impossible(population=4, cohort=2)
