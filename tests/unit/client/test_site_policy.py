"""The lines of a site's policy, one by one: what a plan asks beyond a line is refused before anything is spent."""

from datetime import UTC, date, datetime

import pytest

from client.policy import check_cost, check_moment, check_policy
from conf.compose import compose_experiment
from conf.schema.privacy import ExampleLevel
from conf.schema.site import SiteBudget, SiteFile, SiteNode, SitePolicy, WholeSiteBudget, WorkingHours
from privacy.plan import PrivacyPlan, build_plan
from protocol.errors import SiteRefusal
from protocol.instructions import InstructionHeader, client_plan


def header(*overrides: str) -> InstructionHeader:
    plan = client_plan(compose_experiment(overrides), "run")
    return InstructionHeader(round=1, plan=plan, plan_digest=plan.digest, base_digest="b" * 64, adapter_digest="a" * 64)


def site(**policy: object) -> SiteFile:
    return SiteFile(
        name="clinic",
        published_records=1000,
        data=compose_experiment().data,
        model_path="embedded:clinic-base",
        budget=SiteBudget(epsilon=8, delta=1e-5),
        policy=SitePolicy.model_validate(policy),
        state_directory="state",
    )


@pytest.mark.parametrize(
    ("policy", "overrides", "code"),
    [
        ({"privacy_modes": ["user_level"]}, (), "mode_not_allowed"),
        ({"max_clip_norm": 0.5}, (), "clip_norm_too_large"),
        ({"release_noisy_loss": False}, ("privacy.loss_noise_multiplier=10",), "loss_not_allowed"),
        ({"bases": ["c" * 64]}, (), "base_not_allowed"),
        ({"bases": []}, (), "base_not_allowed"),
        ({"strategies": ["fedit"]}, ("strategy=ffa_lora",), "strategy_not_allowed"),
        ({"dtypes": ["fp32"]}, ("model.dtype=bf16",), "dtype_not_allowed"),
        ({"max_rounds": 7}, ("federation.rounds=8",), "too_many_rounds"),
        ({"max_rank": 7}, ("peft.rank=8",), "rank_too_large"),
    ],
)
def test_each_line_refuses_what_is_beyond_it_and_nothing_else(
    policy: dict[str, object], overrides: tuple[str, ...], code: str
) -> None:
    with pytest.raises(SiteRefusal) as caught:
        check_policy(site(**policy), header(*overrides))
    assert caught.value.code == code
    check_policy(site(), header(*overrides))


def test_fp16_must_be_allowed_by_name() -> None:
    with pytest.raises(SiteRefusal, match=r"model\.dtype=fp16 is not among this site's policy\.dtypes"):
        check_policy(site(), header("model.dtype=fp16"))
    check_policy(site(dtypes=["fp16"]), header("model.dtype=fp16"))


def test_a_codec_is_refused_where_the_policy_lists_others() -> None:
    kind = header("quantization=nf4").plan.quantization.kind
    assert kind != "none"
    for listed in ([], ["another"]):
        with pytest.raises(SiteRefusal, match=f"quantization {kind} is not among") as caught:
            check_policy(site(quantization=listed), header("quantization=nf4"))
        assert caught.value.code == "quantization_not_allowed"
        check_policy(site(quantization=listed), header())
    check_policy(site(quantization=[kind]), header("quantization=nf4"))
    check_policy(site(), header("quantization=nf4"))


@pytest.mark.parametrize(
    ("override", "listed", "code"),
    [
        ("objective=fedprox", "objectives", "objective_not_allowed"),
        ("server_optimizer=fedadam", "server_optimizers", "server_rule_not_allowed"),
        ("robust=median", "robust_rules", "server_rule_not_allowed"),
    ],
)
def test_objectives_and_server_rules_are_listed_or_free(override: str, listed: str, code: str) -> None:
    asked, kind = header(override), override.split("=")[1]
    with pytest.raises(SiteRefusal, match=f"is not among policy.{listed}") as caught:
        check_policy(site(**{listed: []}), asked)
    assert caught.value.code == code
    check_policy(site(**{listed: []}), header())
    check_policy(site(**{listed: [kind]}), asked)
    check_policy(site(), asked)


def plan(noise: float = 1.0, rounds: int = 4) -> PrivacyPlan:
    asked = compose_experiment((f"privacy.noise_multiplier={noise}", "privacy.target_epsilon=null"))
    assert isinstance(asked.privacy, ExampleLevel)
    return build_plan(
        asked.privacy, asked.federation.local, rounds=rounds, published_units=1000, num_units=990, site_delta=1e-5
    )


def test_noise_and_prices_are_compared_with_what_would_be_executed() -> None:
    made = plan()
    run, one = made.epsilon([made.whole_run]), made.epsilon([made.mechanism(made.steps_per_round)])
    assert one < run
    for policy, code in (
        ({"min_noise_multiplier": 1.01}, "noise_too_small"),
        ({"max_epsilon_per_run": run * 0.99}, "epsilon_per_run"),
        ({"max_epsilon_per_round": one * 0.99}, "epsilon_per_round"),
    ):
        with pytest.raises(SiteRefusal) as caught:
            check_cost(site(**policy), made)
        assert caught.value.code == code
    check_cost(site(min_noise_multiplier=1.0, max_epsilon_per_run=run, max_epsilon_per_round=one), made)


@pytest.mark.parametrize(
    ("start", "end", "inside", "outside"),
    [
        # Berlin is an hour ahead of UTC in winter; 2 March 2026 is a Monday.
        ("08:00", "18:00", ("2026-03-02T07:00", "2026-03-02T16:59"), ("2026-03-02T06:59", "2026-03-02T17:00")),
        ("20:00", "06:00", ("2026-03-02T19:00", "2026-03-03T04:59"), ("2026-03-02T04:00", "2026-03-03T05:00")),
        ("00:00", "00:00", ("2026-03-01T23:00", "2026-03-02T22:59"), ("2026-03-01T22:59", "2026-03-02T23:01")),
    ],
)
def test_working_hours(start: str, end: str, inside: tuple[str, ...], outside: tuple[str, ...]) -> None:
    hours = WorkingHours.model_validate({"timezone": "Europe/Berlin", "days": ["mon"], "start": start, "end": end})
    assert [hours.cover(datetime.fromisoformat(at).replace(tzinfo=UTC)) for at in inside] == [True, True]
    assert [hours.cover(datetime.fromisoformat(at).replace(tzinfo=UTC)) for at in outside] == [False, False]


def test_a_time_that_yaml_reads_as_a_number_is_not_misread() -> None:
    with pytest.raises(ValueError, match='write it in quotes: "18:00"'):
        WorkingHours.model_validate({"start": 1080, "end": "20:00"})
    with pytest.raises(ValueError, match="is no time zone of the IANA database"):
        WorkingHours.model_validate({"timezone": "Mars/Base", "start": "08:00", "end": "20:00"})


def test_the_last_day_of_a_budget_counts() -> None:
    file = site().model_copy(update={"budget": SiteBudget(epsilon=8, delta=1e-5, expires=date(2026, 3, 2))})
    plan = header().plan
    check_moment(file, datetime(2026, 3, 2, 23, 59, tzinfo=UTC), plan)
    with pytest.raises(SiteRefusal, match="the budget expired on 2026-03-02"):
        check_moment(file, datetime(2026, 3, 3, tzinfo=UTC), plan)


def test_the_last_day_of_a_whole_sites_budget_counts_in_client_level_runs_alone() -> None:
    file = site().model_copy(update={"site_budget": WholeSiteBudget(epsilon=8, delta=1e-3, expires=date(2026, 3, 2))})
    plan = client_plan(compose_experiment(["privacy=client_level"]), "run")
    check_moment(file, datetime(2026, 3, 2, 23, 59, tzinfo=UTC), plan)
    check_moment(file, datetime(2026, 3, 3, tzinfo=UTC), header().plan)
    with pytest.raises(SiteRefusal, match="site_budget expired on 2026-03-02") as caught:
        check_moment(file, datetime(2026, 3, 3, tzinfo=UTC), plan)
    assert caught.value.code == "budget_expired"


def test_a_node_of_another_user_needs_a_socket_that_user_can_reach() -> None:
    node = SiteNode(superlink="h:1", user="flower")
    with pytest.raises(ValueError, match=r"cannot enter state_directory, .* set serve.socket"):
        SiteFile.model_validate(site().model_dump(mode="json") | {"node": node.model_dump(mode="json")})
