"""Participation limits are enforced, and whatever schedule is let through can be kept to the last round."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.correlated.participation import Participation
from protocol.cards import SiteCard
from protocol.errors import PrivacyError
from server.cohort import Member, draw_in_rotation


def members(*names: str) -> tuple[Member, ...]:
    return tuple(
        Member(node, SiteCard(cloister_version="0", site=name, published_records=1)) for node, name in enumerate(names)
    )


def schedule(population: int, size: int, rounds: int, seed: int = 0) -> list[tuple[str, ...]]:
    everybody = members(*(f"site-{number:02d}" for number in range(population)))
    drawn = [draw_in_rotation(everybody, size, seed, number) for number in range(1, rounds + 1)]
    return [tuple(member.site for member in cohort) for cohort in drawn]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 30), st.integers(0, 9))
def test_the_tightest_possible_limits_are_kept_to_the_last_round(
    size: int, factor: int, rounds: int, seed: int
) -> None:
    """Limits that leave no slack: one less of either is refused, these are kept."""
    population = size * factor + seed % size
    limits = Participation(rounds, population // size, -(-size * rounds // population))
    limits.refuse_impossible(population, size)
    if limits.min_separation < rounds:
        with pytest.raises(PrivacyError, match="min_separation"):
            Participation(rounds, limits.min_separation + 1, rounds).refuse_impossible(population, size)
    if limits.max_participations > 1:
        with pytest.raises(PrivacyError, match="max_participations"):
            Participation(rounds, 1, limits.max_participations - 1).refuse_impossible(population, size)
    drawn = schedule(population, size, rounds, seed)
    for site in {site for cohort in drawn for site in cohort}:
        asked = [number for number, cohort in enumerate(drawn) if site in cohort]
        assert len(asked) <= limits.max_participations
        assert all(later - earlier >= limits.min_separation for earlier, later in itertools.pairwise(asked))
    assert all(len(cohort) == len(set(cohort)) == size for cohort in drawn)


def test_the_rotation_is_drawn_at_random_and_can_be_repeated() -> None:
    assert schedule(9, 3, 6, seed=1) == schedule(9, 3, 6, seed=1)
    assert schedule(9, 3, 6, seed=1) != schedule(9, 3, 6, seed=2)
