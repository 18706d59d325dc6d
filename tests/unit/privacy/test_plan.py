"""One object from which rate, noise, clip norm and δ come."""

import math
from typing import Any

import pytest

from conf.schema.federation import LocalTraining
from conf.schema.privacy import ExampleLevel, NoPrivacy, UserLevel
from privacy.accounting import ACCOUNTANT, epsilon_of
from privacy.calibration import calibrate_noise
from privacy.mechanisms import SubsampledGaussian, Truncation
from privacy.plan import PrivacyPlan, build_plan, default_delta, relation_of
from protocol.errors import PrivacyError

LOCAL = LocalTraining(steps=4, expected_batch_size=50)


def plan(privacy: ExampleLevel | NoPrivacy | None = None, **options: Any) -> PrivacyPlan:
    given = {"rounds": 5, "published_units": 1000, "num_units": 1000, **options}
    return build_plan(privacy or ExampleLevel(noise_multiplier=1.0), LOCAL, **given)


def test_the_rate_and_the_normalizer_are_public_numbers() -> None:
    """The true count changes nothing that could be observed."""
    plans = [plan(num_units=count) for count in (1, 999, 1000)]
    assert all(each == plans[0] for each in plans)
    assert plans[0].sampling.rate == 0.05
    assert plans[0].normalizer == 50
    assert (plans[0].steps_per_round, plans[0].rounds) == (4, 5)


def test_every_unit_needs_a_slot() -> None:
    """A unit without one would take the place of a removed unit: a substitution, and no removal."""
    with pytest.raises(PrivacyError, match=r"has 1001 units and publishes a count of 1000: .* published_records"):
        plan(num_units=1001)


@pytest.mark.parametrize("cap", [None, 1.5, 3.0, 100.0])
@pytest.mark.parametrize("count", [1, 1000])
def test_the_relation_is_that_of_slots_whether_or_not_a_batch_is_cut(cap: float | None, count: int) -> None:
    """At n = published a further record is refused: an ε for adding it would be of a data set that cannot be."""
    record = plan(ExampleLevel(noise_multiplier=1.0, batch_cap=cap), num_units=count)
    user = plan(UserLevel(noise_multiplier=1.0, batch_cap=cap), num_units=count)
    assert (
        record.relation == relation_of("record") == "add or remove one record of a site, in one of its published slots"
    )
    assert user.relation == relation_of("user")
    assert user.relation.endswith("in one of its published slots")


def test_delta_is_a_tenth_of_one_over_n() -> None:
    assert plan().delta == default_delta(1000) == pytest.approx(1e-4)
    assert plan(published_units=300, num_units=300).delta == pytest.approx(1 / 3000)


@pytest.mark.parametrize(
    ("asked", "site", "expected"), [(1e-5, None, 1e-5), (1e-5, 1e-6, 1e-6), (1e-6, 1e-6, 1e-6), (None, 1e-7, 1e-7)]
)
def test_one_delta_the_site_s_own(asked: float | None, site: float | None, expected: float) -> None:
    """Plan, ledger and statements agree, because there is only one."""
    assert plan(ExampleLevel(noise_multiplier=1.0, delta=asked), site_delta=site).delta == expected


def test_a_plan_cannot_ask_for_less_than_the_site_accounts_for() -> None:
    with pytest.raises(PrivacyError, match=r"privacy\.delta=1e-06 is below the δ=1e-05 at which this site keeps"):
        plan(ExampleLevel(noise_multiplier=1.0, delta=1e-6), site_delta=1e-5)


@pytest.mark.parametrize("asked", [None, 1e-3, 0.1])
def test_a_budget_at_one_over_n_is_refused_whatever_is_asked(asked: float | None) -> None:
    """Were the answer to depend on what is asked, a server could search for n by asking."""
    for count in (100, 1000):
        with pytest.raises(PrivacyError, match=r"is not below 1/n"):
            plan(ExampleLevel(noise_multiplier=1.0, delta=asked), site_delta=0.01, num_units=count)
        assert plan(ExampleLevel(noise_multiplier=1.0, delta=asked), site_delta=1e-4, num_units=count)


def test_a_site_delta_costs_more_noise() -> None:
    private = ExampleLevel(target_epsilon=2.0, delta=1e-5)
    assert plan(private, site_delta=1e-7).noise_multiplier > plan(private).noise_multiplier


@pytest.mark.parametrize(("published", "true"), [(1000, 400), (400, 400)])
def test_a_delta_of_one_over_n_is_refused(published: int, true: int) -> None:
    """The smaller count decides: published counts may be rounded up."""
    for delta in (1 / 400, 0.1):
        with pytest.raises(
            PrivacyError,
            match=rf"δ={delta:.3g} \(privacy\.delta, or budget\.delta of a site file\) is not below 1/n=0\.0025 of "
            r"this site's 400 records: publishing one "
            r"record in the clear would keep such a promise; use at most 0\.00025, or null",
        ):
            plan(ExampleLevel(noise_multiplier=1.0, delta=delta), published_units=published, num_units=true)
    assert plan(ExampleLevel(noise_multiplier=1.0, delta=0.00249), published_units=published, num_units=true)


@pytest.mark.parametrize(
    ("published", "most", "rate"), [(40, 1.0, 1.0), (50, 1.0, 1.0), (100, 0.2, 0.2), (1000, 0.2, 0.05)]
)
def test_a_smaller_site_draws_at_the_largest_rate_and_divides_by_its_own_batch(
    published: int, most: float, rate: float
) -> None:
    """The count is public, so rate and divisor are."""
    local = LOCAL.model_copy(update={"largest_rate": most})
    made = build_plan(
        ExampleLevel(target_epsilon=2.0), local, rounds=5, published_units=published, num_units=published // 2
    )
    assert (made.sampling.rate, made.normalizer) == (rate, rate * published)
    assert made.sampling.cap == 3 * made.normalizer
    assert made.epsilon([made.whole_run]) <= 2.0
    assert made.whole_run.sampling_rate == rate


def test_a_target_is_calibrated_for_all_rounds_together() -> None:
    made = plan(ExampleLevel(target_epsilon=3.0, clip_norm=0.7))
    assert made.noise_multiplier == calibrate_noise(3.0, 1e-4, SubsampledGaussian(0.05, 1.0, 20, Truncation(1000, 150)))
    assert made.epsilon([made.mechanism(4)] * 5) <= 3.0
    assert made.epsilon([made.mechanism(4)] * 5) > 2.99
    assert made.epsilon([made.mechanism(4)] * 6) > 3.0


def test_a_given_multiplier_is_taken_as_it_is() -> None:
    made = plan(ExampleLevel(noise_multiplier=1.25, clip_norm=0.4))
    assert made.mechanism(7) == SubsampledGaussian(0.05, 1.25, 7, Truncation(1000, 150))
    assert made.noise(1).standard_deviation == 1.25 * 0.4
    assert made.epsilon([made.mechanism(7)]) == epsilon_of([made.mechanism(7)], 1e-4)
    assert (made.is_private, made.accountant, made.unit) == (True, ACCOUNTANT, "record")


def test_neither_target_nor_multiplier_is_refused() -> None:
    with pytest.raises(
        PrivacyError, match=r"give privacy\.target_epsilon or privacy\.noise_multiplier; neither is set"
    ):
        plan(ExampleLevel())


def test_without_privacy_nothing_is_promised() -> None:
    made = plan(NoPrivacy())
    assert (made.is_private, made.delta, made.accountant, made.unit) == (False, None, "none", "none")
    assert made.epsilon([made.mechanism(1)]) == math.inf
    assert made.noise(1).standard_deviation == 0.0
    assert (made.clip_norm, made.noise_multiplier) == (math.inf, 0.0)
    assert (made.sampling.rate, made.normalizer) == (0.05, 50)
