"""`summary.json` is a fold over events: sums add up, and what was spent counts whether or not it was used."""

from datetime import UTC, datetime
from typing import Any

import pytest

from conf.compose import compose_experiment
from privacy.accounting import epsilon_of
from privacy.mechanisms import SubsampledGaussian
from protocol.instructions import PrivacyStatement
from server.events import Evaluated, Event, RoundFinished, RoundStarted, RunFinished, RunStarted, SiteReplied
from server.summary import summarize


def statement(epsilon: float, steps: int = 4) -> PrivacyStatement:
    return PrivacyStatement(
        unit="one record",
        relation="add or remove one record of a site",
        epsilon_run=epsilon,
        epsilon_total=epsilon,
        epsilon_budget=8.0,
        delta=1e-5,
        accountant="PLD",
        sampling_rate=0.1,
        steps_executed=steps,
    )


def summary(*events: Event, status: str = "finished", overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    started = datetime(2026, 3, 4, tzinfo=UTC)
    return summarize(compose_experiment(overrides), events, base_digest="b", started=started, status=status)


STARTED = RunStarted("run-1", 2, ("north", "south"), 10)


def test_a_run() -> None:
    made = summary(
        STARTED,
        Evaluated(0, "perplexity", 20.0, 3.0, 50, {"north": 19.0, "south": 21.0}),
        RoundStarted(1, ("north", "south")),
        SiteReplied(1, "north", True, 100, 90, statement(1.0)),
        SiteReplied(1, "south", True, 100, 80, statement(2.0)),
        RoundFinished(1, 2, 0, 0.5, 3.0, 0.25, 0.0, 0.5),
        RoundStarted(2, ("north",)),
        SiteReplied(2, "north", True, 100, 90, statement(1.5, 8)),
        Evaluated(2, "perplexity", 10.0, 2.3, 50, {"north": 9.0, "south": 11.0}),
        RoundFinished(2, 1, 0, 0.25, 2.0, 0.25, 1.0, 0.5),
        RunFinished("run-1", 9.0, "d"),
    )
    assert made["bytes"] == {"down": 300, "up": 260}
    assert made["sites"]["north"]["bytes"] == {"down": 200, "up": 180}
    assert made["seconds"] == {"train": 5.0, "aggregate": 0.5, "evaluate": 1.0, "other": 1.0, "total": 9.0}
    assert made["privacy"]["epsilon"] == 2.0, "the worst site, not the sum"
    assert not made["privacy"]["at_least"]
    assert [item["epsilon"] for item in made["rounds"]] == [{"north": 1.0, "south": 2.0}, {"north": 1.5}]
    assert made["sites"]["south"]["quality"] == {"first": 21.0, "last": 11.0}
    assert (made["final"]["base"], made["final"]["value"]) == (20.0, 10.0)
    assert made["rounds"][0]["evaluation"] is None
    assert made["started"] == "2026-03-04T00:00:00+00:00"


def test_a_rejected_update_was_seen_so_its_epsilon_counts() -> None:
    made = summary(
        STARTED,
        RoundStarted(1, ("north", "south")),
        SiteReplied(1, "north", True, 1, 1, statement(1.0)),
        SiteReplied(1, "south", False, 1, 1, statement(3.0), code="not_finite", reason="w holds NaN"),
    )
    assert made["privacy"]["epsilon"] == 3.0
    assert made["sites"]["south"]["rejected"] == 1
    assert made["rounds"][0]["accepted"] == ["north"]
    assert made["rounds"][0]["rejected"] == [{"site": "south", "code": "not_finite", "reason": "w holds NaN"}]


@pytest.mark.parametrize(
    "code", ["no_reply", "flower_error", "malformed_reply", "site_error", "site_down", "site_silent"]
)
def test_a_lost_reply_makes_epsilon_a_lower_bound(code: str) -> None:
    lost = SiteReplied(1, "south", False, 1, 0, code=code, reason="no reply")
    events = (STARTED, RoundStarted(1, ("north", "south")), SiteReplied(1, "north", True, 1, 1, statement(1.0)), lost)
    assert summary(*events)["privacy"]["at_least"]
    refused = SiteReplied(1, "south", False, 1, 0, code="budget_exceeded", reason="no")
    assert not summary(*events[:-1], refused)["privacy"]["at_least"]


def test_a_person_at_several_sites_pays_for_all_that_was_booked_there() -> None:
    """A site that changed its plan in mid-run states both mechanisms."""
    plain, loud = SubsampledGaussian(0.1, 2.0, 8), SubsampledGaussian(0.2, 1.0, 4)

    def over_sites(*mechanisms: SubsampledGaussian) -> float | None:
        books = tuple(mechanism.to_json() for mechanism in mechanisms)
        made = statement(0.1).model_copy(update={"mechanisms": books})
        events = [SiteReplied(1, site, True, 1, 1, made) for site in ("north", "south")]
        return summary(STARTED, *events, overrides=("federation.sites_per_person=2",))["privacy"]["epsilon_over_sites"]

    assert over_sites(plain, loud) == pytest.approx(epsilon_of([plain, loud] * 2, 1e-5))
    assert over_sites() is None


@pytest.mark.parametrize(
    ("stated", "figure"),
    [
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 2.5}, None),
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 10**400}, None),
        ({"sampling_rate": 0.5, "noise_multiplier": 1e300, "steps": 10}, None),
        ({"sampling_rate": 0.5, "noise_multiplier": 1e-300, "steps": 10}, None),
        # Loss distributions would take hours: the Rényi cost is an upper bound too.
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 10**9}, pytest.approx(1.526847e7, rel=1e-4)),
    ],
)
def test_whatever_a_site_states_a_finished_run_has_a_summary(stated: dict[str, Any], figure: object) -> None:
    honest = statement(0.5).model_copy(update={"mechanisms": (SubsampledGaussian(0.1, 2.0, 8).to_json(),)})
    lying = statement(0.5).model_copy(update={"mechanisms": (stated,), "unit": "site"})
    events = [SiteReplied(1, "north", True, 1, 1, honest), SiteReplied(1, "south", True, 1, 1, lying)]
    made = summary(STARTED, *events, overrides=("federation.sites_per_person=2",))["privacy"]
    assert made["epsilon_over_sites"] == figure
    assert made["epsilon"] == 0.5


def test_a_run_that_never_started() -> None:
    made = summary(status="failed")
    assert made["status"] == "failed"
    assert made["rounds"] == []
    assert made["final"] is None
    assert made["seconds"]["total"] is None


def test_without_privacy_there_is_no_epsilon() -> None:
    made = summary(STARTED, overrides=("privacy=none",))
    assert made["privacy"]["epsilon"] is None
    assert made["privacy"]["delta"] is None
    assert not made["privacy"]["insecure_seed"]
