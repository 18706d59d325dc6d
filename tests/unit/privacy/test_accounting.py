"""Which accountant prices what, and that its figure is right: against dp-accounting's, Opacus' and closed forms."""

import math

import dp_accounting
import pytest
from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    TruncatedSubsampledGaussianDpEvent,
    UnsupportedDpEvent,
)
from dp_accounting.pld import PLDAccountant

from privacy.accounting import (
    ACCOUNTANT,
    EXACT_GAUSSIAN,
    RENYI,
    accountant_of,
    epsilon_of,
    epsilon_over_sites,
    rdp_epsilon_of,
    selection_epsilon,
)
from privacy.mechanisms import SubsampledGaussian, Truncation
from protocol.errors import PrivacyError

SAMPLED, OTHER = SubsampledGaussian(0.01, 1.0, 200), SubsampledGaussian(0.05, 1.5, 50)
FULL = SubsampledGaussian(1.0, 8.0, 3)
CUT = SubsampledGaussian(0.02, 1.2, 100, Truncation(800, 32))
DISCRETE = SubsampledGaussian(0.02, 1.2, 100, discrete=True)
MIXED = (SAMPLED, OTHER, FULL)


def event_of(mechanism: SubsampledGaussian) -> DpEvent:
    """Return `mechanism` in the language of dp-accounting.

    A cut batch is a `TruncatedSubsampledGaussianDpEvent`, to be read under the relation REPLACE_SPECIAL. Discrete noise
    has no event there, and is handed over as unsupported rather than as something it is not.
    """
    if mechanism.discrete:
        return UnsupportedDpEvent()
    if mechanism.truncation is not None:
        step: DpEvent = TruncatedSubsampledGaussianDpEvent(
            mechanism.truncation.slots, mechanism.sampling_rate, mechanism.truncation.cap, mechanism.noise_multiplier
        )
    elif mechanism.sampling_rate == 1:
        step = GaussianDpEvent(mechanism.noise_multiplier)
    else:
        step = PoissonSampledDpEvent(mechanism.sampling_rate, GaussianDpEvent(mechanism.noise_multiplier))
    return SelfComposedDpEvent(step, mechanism.steps)


def by_the_library(mechanisms: tuple[SubsampledGaussian, ...], relation: NeighboringRelation) -> float:
    event = dp_accounting.ComposedDpEvent([event_of(mechanism) for mechanism in mechanisms])
    return PLDAccountant(relation, value_discretization_interval=1e-3).compose(event).get_epsilon(1e-5)


@pytest.mark.parametrize("mechanisms", [(SAMPLED,), MIXED, (CUT, SAMPLED)], ids=["sampled", "mixed", "cut"])
def test_the_event_means_the_same_to_the_library(mechanisms: tuple[SubsampledGaussian, ...]) -> None:
    """Uncut steps to the error of the grid; of a cut step both give upper bounds, half a percent apart here."""
    theirs = by_the_library(mechanisms, NeighboringRelation.REPLACE_SPECIAL)
    assert epsilon_of(mechanisms, 1e-5) == pytest.approx(theirs, rel=0.006 if CUT in mechanisms else 0.003)


def test_uncut_sampling_costs_the_same_under_both_relations() -> None:
    """So cut and uncut steps may stand in one composition, under the relation of emptied slots."""
    added = by_the_library(MIXED, NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert by_the_library(MIXED, NeighboringRelation.REPLACE_SPECIAL) == added


def test_an_event_for_each_mechanism() -> None:
    assert event_of(FULL) == dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(8.0), 3)
    cut = dp_accounting.TruncatedSubsampledGaussianDpEvent(800, 0.02, 32, 1.2)
    assert event_of(CUT) == dp_accounting.SelfComposedDpEvent(cut, 100)
    assert not PLDAccountant().supports(event_of(DISCRETE))


def test_the_named_accountant_computes() -> None:
    assert accountant_of([FULL, FULL.repeated(9)]) == EXACT_GAUSSIAN
    assert accountant_of(MIXED) == accountant_of([CUT]) == ACCOUNTANT
    assert accountant_of([DISCRETE]) == accountant_of([SAMPLED, DISCRETE]) == RENYI
    together = epsilon_of([SAMPLED, DISCRETE], 1e-5)
    assert together == rdp_epsilon_of([SAMPLED, DISCRETE], 1e-5)
    assert together == pytest.approx(rdp_epsilon_of([SAMPLED, SubsampledGaussian(0.02, 1.2, 100)], 1e-5), rel=0.02)


@pytest.mark.parametrize("mechanisms", [(SAMPLED,), MIXED, (CUT,), (FULL,)], ids=["sampled", "mixed", "cut", "full"])
def test_the_second_accountant_is_above_the_first_and_not_far(mechanisms: tuple[SubsampledGaussian, ...]) -> None:
    ours = epsilon_of(mechanisms, 1e-5)
    assert ours < rdp_epsilon_of(mechanisms, 1e-5) < (2.5 if CUT in mechanisms else 1.7) * ours


def test_mechanisms_compose_whatever_their_order_and_grouping() -> None:
    ours = epsilon_of(MIXED, 1e-5)
    assert epsilon_of(MIXED[::-1], 1e-5) == pytest.approx(ours, rel=1e-9)
    assert epsilon_of([SAMPLED.repeated(1)] * 200 + [OTHER, FULL], 1e-5) == ours


def test_unsampled_gaussians_are_one_and_exact() -> None:
    """Steps add 1/σ² each; δ(ε) of the sum is known (Balle and Wang 2018, arXiv 1805.06530, equation 6)."""
    mechanisms = [SubsampledGaussian(1.0, 6.0, 9), SubsampledGaussian(1.0, 4.0, 2)]
    delta, mu = 1e-5, math.sqrt(9 / 36 + 2 / 16)

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    for size in (1, 3):
        ours, signal = epsilon_of(mechanisms, delta, group_size=size), size * mu
        reached = normal(signal / 2 - ours / signal) - math.exp(ours) * normal(-signal / 2 - ours / signal)
        assert reached == pytest.approx(delta, rel=1e-8)


def test_unsampled_discrete_noise_is_concentrated() -> None:
    """ρ = 1/(2σ²) per step, times the square of the group; above the continuous cost, below all listed orders."""
    steps = [SubsampledGaussian(1.0, 6.0, 9, discrete=True)]
    exact = epsilon_of([SubsampledGaussian(1.0, 6.0, 9)], 1e-5)
    assert exact < epsilon_of(steps, 1e-5) <= rdp_epsilon_of(steps, 1e-5)
    grouped = epsilon_of([SubsampledGaussian(1.0, 2.0, 9, discrete=True)], 1e-5)
    assert epsilon_of(steps, 1e-5, group_size=3) == pytest.approx(grouped, rel=1e-9)


def test_a_group_costs_more_than_its_members_and_discrete_groups_are_bounded() -> None:
    small = SubsampledGaussian(0.01, 2.0, 100)
    costs = [epsilon_of([small], 1e-5, group_size=size) for size in (1, 2, 3)]
    assert 2 * costs[0] < costs[1] < costs[2]
    cut = SubsampledGaussian(0.01, 2.0, 100, Truncation(800, 24))
    assert costs[1] <= epsilon_of([cut], 1e-5, group_size=2) * 1.001
    discrete = SubsampledGaussian(0.01, 2.0, 100, discrete=True)
    assert costs[1] < epsilon_of([discrete], 1e-5, group_size=2) < math.inf


@pytest.mark.parametrize("steps", [[], [SubsampledGaussian(0.1, 1.0, 0)], [SubsampledGaussian(0.1, 0.0, 0)]])
def test_nothing_executed_costs_nothing(steps: list[SubsampledGaussian]) -> None:
    assert epsilon_of(steps, 1e-5) == rdp_epsilon_of(steps, 1e-5) == 0.0


@pytest.mark.parametrize("silent", [(0.1, 0.0, 1), (1.0, 0.0, 1), (0.1, 0.04, 1)])
def test_no_noise_or_nearly_none_costs_infinity(silent: tuple[float, float, int]) -> None:
    assert epsilon_of([SubsampledGaussian(*silent)], 1e-5) == math.inf
    assert epsilon_of([SAMPLED, SubsampledGaussian(*silent)], 1e-5) == math.inf


def test_it_moves_the_right_way() -> None:
    def cost(rate: float = 0.02, noise: float = 1.0, steps: int = 100, delta: float = 1e-5, cap: int = 10**6) -> float:
        return epsilon_of([SubsampledGaussian(rate, noise, steps, Truncation(1000, cap))], delta)

    assert cost() < cost(steps=101) < cost(steps=200)
    assert cost() < cost(rate=0.03)
    assert cost() < cost(noise=0.9)
    assert cost() < cost(delta=1e-6)
    assert cost() < cost(cap=40) < cost(cap=30)
    assert epsilon_of(MIXED[:2], 1e-5) < epsilon_of(MIXED, 1e-5)


def test_a_group_of_nobody_is_refused() -> None:
    with pytest.raises(PrivacyError, match="group_size=0: a group has at least 1 unit"):
        epsilon_of([SAMPLED], 1e-5, group_size=0)


def test_a_search_costs_more_the_more_runs_it_makes() -> None:
    costs = [selection_epsilon([SAMPLED], 1e-5, mean_trials=mean) for mean in (1, 2, 8)]
    assert rdp_epsilon_of([SAMPLED], 1e-5) < costs[0] < costs[1] < costs[2]
    assert costs[2] < rdp_epsilon_of([SAMPLED] * 8, 1e-5)


@pytest.mark.parametrize("mean", [0.5, math.inf, math.nan])
def test_a_search_of_less_than_a_run_is_refused(mean: float) -> None:
    with pytest.raises(PrivacyError, match="the mean number of runs must be 1 or more, and finite"):
        selection_epsilon([SAMPLED], 1e-5, mean_trials=mean)


def test_a_person_at_one_site_pays_the_dearest_never_the_sum() -> None:
    sites = [[SAMPLED], [OTHER, FULL], []]
    assert epsilon_over_sites(sites, 1e-5) == epsilon_of([OTHER, FULL], 1e-5)
    assert epsilon_over_sites([], 1e-5) == 0.0


def test_a_person_at_several_sites_pays_for_the_dearest_choice_of_them() -> None:
    """A hundred sites alike cost what any two of them do; of different ones every pair is looked at."""
    assert epsilon_over_sites([[SAMPLED]] * 100, 1e-5, overlap=2) == epsilon_of([SAMPLED] * 2, 1e-5)
    sites = [[SAMPLED], [OTHER], [FULL]]
    pairs = [epsilon_of(left + right, 1e-5) for left, right in ((sites[0], sites[1]), (sites[0], sites[2]))]
    pairs.append(epsilon_of(sites[1] + sites[2], 1e-5))
    assert epsilon_over_sites(sites, 1e-5, overlap=2) == pytest.approx(max(pairs), rel=1e-9)
    assert epsilon_over_sites(sites, 1e-5, overlap=3) == pytest.approx(epsilon_of(MIXED, 1e-5), rel=1e-9)


def test_too_many_choices_of_sites_are_bounded_from_above() -> None:
    sites = [[SubsampledGaussian(0.005 * (1 + i), 1.0, 50)] for i in range(10)]
    dearest = epsilon_of(sites[-1] + sites[-2], 1e-5)
    assert dearest < epsilon_over_sites(sites, 1e-5, overlap=2) < 1.5 * dearest


@pytest.mark.parametrize("overlap", [0, 3])
def test_an_overlap_beyond_the_sites_is_refused(overlap: int) -> None:
    message = rf"overlap={overlap}: of 2 sites a person can be at 1 to 2; lower the overlap|overlap=0"
    with pytest.raises(PrivacyError, match=message):
        epsilon_over_sites([[SAMPLED], [OTHER]], 1e-5, overlap=overlap)
