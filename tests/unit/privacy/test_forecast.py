"""The forecast: the formula against a simulation, the plan's own numbers, and fixes that fix."""

import math
from dataclasses import replace

import numpy as np
import pytest

from conf.compose import compose_experiment
from conf.schema.federation import Federation, LocalTraining
from conf.schema.privacy import ClientLevel, ExampleLevel, NoPrivacy, UserLevel
from privacy.accounting import epsilon_of, selection_epsilon
from privacy.forecast import (
    Scenario,
    client_outlook,
    forecast,
    group_cost,
    nearest_feasible,
    of_rank,
    person_cost,
    search_cost,
    selection_cost,
    signal_to_noise,
    variations,
)
from privacy.mechanisms import SubsampledGaussian
from privacy.plan import build_plan

FIXED = ExampleLevel(noise_multiplier=1.0, batch_cap=None)
LOCAL = LocalTraining(steps=2, expected_batch_size=10)
SCENARIO = Scenario("here", FIXED, LOCAL, rounds=3, published=1000, sites=4, parameters=400)


def test_the_ratio_is_that_of_a_simulated_run_at_its_best() -> None:
    """All gradients at the clip norm and parallel. The norm of 400·8 Gaussians is known to 5/√(2·3200): 1e-6."""
    plan = build_plan(FIXED, LOCAL, rounds=3, published_units=1000, num_units=1000)
    generator = np.random.default_rng(0)
    steps, sites, d = 6, 4, 400
    noise = generator.normal(0, 1.0 / 10, (8, sites, steps, d)).sum(axis=2).mean(axis=1)
    measured = steps * 1.0 / math.sqrt(np.square(noise).sum(axis=1).mean())
    assert signal_to_noise(plan, d, sites=sites, rounds=3) == pytest.approx(measured, rel=5 / math.sqrt(2 * 3200))


def test_an_outlook_is_the_plan_that_sites_would_build() -> None:
    (outlook,) = forecast([SCENARIO])
    plan = build_plan(FIXED, LOCAL, rounds=3, published_units=1000, num_units=1000)
    assert (outlook.noise_multiplier, outlook.delta, outlook.relation) == (1.0, plan.delta, plan.relation)
    assert [number for number, _ in outlook.curve] == [1, 2, 3]
    assert outlook.curve[1][1] == plan.epsilon([plan.mechanism(4)])
    assert outlook.epsilon == plan.epsilon([plan.whole_run])
    assert outlook.snr_run == pytest.approx(math.sqrt(3) * outlook.snr_round)


def test_without_privacy_nothing_is_promised() -> None:
    (outlook,) = forecast([replace(SCENARIO, privacy=NoPrivacy())])
    assert (outlook.epsilon, outlook.noise_multiplier, outlook.snr_run) == (math.inf, 0.0, math.inf)
    assert outlook.curve == ()
    assert outlook.problem == ""


def test_a_long_run_is_looked_at_in_few_rounds() -> None:
    (outlook,) = forecast([replace(SCENARIO, rounds=1000, curve_points=4)])
    assert [number for number, _ in outlook.curve] == [1, 334, 667, 1000]


@pytest.mark.parametrize(
    ("privacy", "published", "problem"),
    [
        (ExampleLevel(noise_multiplier=1.0, delta=0.01), 100, r"not below 1/n"),
        (ExampleLevel(target_epsilon=0.001, delta=1e-5, batch_cap=None), 11, r"too small|noise multiplier of 1000"),
        (ExampleLevel(target_epsilon=4.0, loss_noise_multiplier=0.2, batch_cap=None), 1000, r"loss_noise_multiplier"),
    ],
)
def test_every_fix_fixes(privacy: ExampleLevel, published: int, problem: str) -> None:
    """Each proposed override, applied on its own to the same site, makes the scenario feasible."""
    scenario = replace(SCENARIO, privacy=privacy, published=published, rounds=6, curve_points=1)
    (outlook,) = forecast([scenario])
    assert outlook.epsilon is None
    with pytest.raises(AssertionError, match=problem):
        assert not outlook.problem, outlook.problem
    assert outlook.fixes
    for fix in outlook.fixes:
        (again,) = forecast([applied(scenario, fix)])
        assert again.problem == "", fix


def applied(scenario: Scenario, fix: str) -> Scenario:
    path, text = fix.split("=")
    value = None if text == "null" else float(text)
    group, name = path.rsplit(".", 1)
    if group == "privacy":
        return replace(scenario, privacy=scenario.privacy.model_copy(update={name: value}))
    if group == "federation.local":
        return replace(scenario, local=scenario.local.model_copy(update={name: value}))
    return replace(scenario, rounds=int(text))


def test_a_feasible_scenario_needs_no_fix() -> None:
    assert nearest_feasible(SCENARIO) == ()
    assert nearest_feasible(replace(SCENARIO, privacy=NoPrivacy())) == ()


def test_variations_are_overrides_that_compose() -> None:
    labels = [each.label for each in variations(replace(SCENARIO, privacy=ExampleLevel(target_epsilon=8.0)))]
    assert labels == [
        "federation.local.expected_batch_size=20",
        "federation.local.expected_batch_size=40",
        "federation.rounds=1",
        "privacy.target_epsilon=4",
    ]
    compose_experiment(labels)
    assert not any("batch" in each.label for each in variations(replace(SCENARIO, published=15)))


def test_a_smaller_rank_costs_the_same_and_has_less_noise() -> None:
    (outlook,) = forecast([SCENARIO])
    smaller = of_rank(outlook, 4, 400, 100)
    assert smaller.snr_run == pytest.approx(2 * (outlook.snr_run or 0))
    assert smaller.epsilon == outlook.epsilon
    assert of_rank(outlook, 4, None, None).snr_run is None


def test_searching_is_spending() -> None:
    (outlook,) = forecast([SCENARIO])
    run = SubsampledGaussian(0.01, 1.0, 6)
    assert search_cost(SCENARIO, outlook, 3) == epsilon_of([run.repeated(18)], 1e-4)
    assert selection_cost(SCENARIO, outlook, 3) == selection_epsilon([run], 1e-4, mean_trials=3)


def test_records_of_one_person_add_up() -> None:
    (outlook,) = forecast([SCENARIO])
    assert outlook.epsilon is not None
    costs = [group_cost(SCENARIO, outlook, size) for size in (1, 2, 4)]
    assert costs[0] == outlook.epsilon
    assert costs[1] > 2 * outlook.epsilon, "at one δ the ε of a group grows faster than its size"
    assert costs == [epsilon_of([SubsampledGaussian(0.01, 1.0, 6)], 1e-4, group_size=size) for size in (1, 2, 4)]


def test_without_privacy_nothing_has_a_price() -> None:
    scenario = replace(SCENARIO, privacy=NoPrivacy())
    (outlook,) = forecast([scenario])
    with pytest.raises(ValueError, match="nothing is promised, so nothing has a price"):
        search_cost(scenario, outlook, 3)


def test_a_plan_of_users_is_that_of_their_published_count() -> None:
    users = replace(SCENARIO, privacy=UserLevel(noise_multiplier=1.0, batch_cap=None))
    (outlook,) = forecast([users])
    assert outlook.epsilon == forecast([SCENARIO])[0].epsilon
    assert outlook.relation == (
        "add or remove one user of a site, with all of the user's records, in one of its published slots"
    )


SITES = {f"site-{number}": 1.0 for number in range(100)}


def test_a_federation_of_whole_sites_has_one_line() -> None:
    federation = Federation(rounds=9, cohort_size=10)
    line = client_outlook(ClientLevel(noise_multiplier=4.0), federation, SITES, 25)
    assert line.epsilon == pytest.approx(epsilon_of([SubsampledGaussian(1.0, 4.0, 9)], 1e-3))
    assert line.snr_round == pytest.approx(10 / (4 * 5))
    assert line.snr_run == pytest.approx(3 * 10 / (4 * 5))
    weighted = client_outlook(ClientLevel(noise_multiplier=4.0), federation, SITES | {"site-0": 2.0}, 25)
    assert weighted.snr_round == pytest.approx(10.1 / (2 * 4 * 5))


def test_correlated_noise_is_charged_once_and_hurts_a_long_run_less() -> None:
    """ε is that of one Gaussian; the ratio of the run is above that of independent noise of the same ε."""
    federation = Federation(rounds=16, cohort_size=10)
    alone, tree = (
        client_outlook(ClientLevel.model_validate({"target_epsilon": 4.0, "noise": noise}), federation, SITES, 25)
        for noise in ({"kind": "independent"}, {"kind": "tree", "max_participations": 2, "min_separation": 8})
    )
    assert tree.curve == ((16, tree.epsilon),)
    assert tree.epsilon == pytest.approx(epsilon_of([SubsampledGaussian(1.0, tree.noise_multiplier or 0, 1)], 1e-3))
    assert (tree.snr_run or 0) > (alone.snr_run or 0)


def test_a_federation_that_cannot_be_says_why() -> None:
    four = dict.fromkeys(list(SITES)[:4], 1.0)
    refused = client_outlook(ClientLevel(noise_multiplier=4.0, delta=0.5), Federation(rounds=9), four, None)
    assert "privacy.delta=0.5 is not below 1/4 sites" in refused.problem
    assert refused.fixes == ("privacy.delta=null",)
    tired = ClientLevel.model_validate({"noise_multiplier": 4.0, "noise": {"kind": "tree", "max_participations": 1}})
    refused = client_outlook(tired, Federation(rounds=9), four, None)
    assert "raise privacy.noise.max_participations to 9" in refused.problem
    assert refused.fixes == ("federation.rounds=1",)


def test_a_person_at_several_sites_costs_more_than_at_one_and_less_than_the_sum() -> None:
    sites = [(scenario, forecast([scenario])[0], 1) for scenario in (_site("a", 1000), _site("b", 2000))]
    one, two, more = (person_cost(sites, several) for several in (1, 2, 5))
    assert one == max(outlook.epsilon or 0.0 for _, outlook, _ in sites)
    assert one < two < 2 * one
    assert two == more, "there are no more sites"
    assert person_cost([(sites[0][0], sites[0][1], 2)], 2) > one


def _site(label: str, published: int) -> Scenario:
    privacy = ExampleLevel(target_epsilon=2.0, delta=1e-5)
    return Scenario(label, privacy, LocalTraining(steps=2, expected_batch_size=32), 4, published)


def test_several_whole_sites_of_one_person_are_a_group() -> None:
    privacy = ClientLevel(target_epsilon=None, noise_multiplier=4.0, delta=1e-3)
    weights = dict.fromkeys("abcdefgh", 1.0)
    one, three = (
        client_outlook(privacy, Federation(rounds=4, sites_per_person=several), weights, None) for several in (1, 3)
    )
    assert one.epsilon_person == one.epsilon == three.epsilon
    assert three.epsilon_person == epsilon_of([SubsampledGaussian(1.0, 4.0, 4)], 1e-3, group_size=3)
