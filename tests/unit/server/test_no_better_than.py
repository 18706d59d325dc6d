"""A run that ends no better than it began says so, loudly."""

from datetime import UTC, datetime
from typing import Any

import pytest

from conf.compose import compose_experiment
from server.events import Evaluated, RunStarted
from server.report import render_report
from server.summary import no_better_than, summarize


def a_summary(metric: str, *values: float) -> dict[str, Any]:
    """Return the summary of a run whose held-out quality was measured before round 1 and after each one."""
    evaluated = [Evaluated(number, metric, value, 1.5, 99, {"harbor": value}) for number, value in enumerate(values)]
    return summarize(
        compose_experiment(),
        [RunStarted("a-run", 4, ("harbor",), 8), *evaluated],
        base_digest="ba" * 32,
        started=datetime(2026, 3, 4, tzinfo=UTC),
        status="finished",
    )


@pytest.mark.parametrize(
    ("metric", "values", "warned"),
    [
        ("perplexity", (10.6, 47561.0), True),
        ("perplexity", (10.6, float("inf")), True),
        ("perplexity", (10.6, float("nan")), True),
        ("perplexity", (10.6, 12.0, 10.5), False),
        ("accuracy", (0.5, 0.5), True),
        ("accuracy", (0.5, 0.7, 0.4), True),
        ("accuracy", (0.5, 0.51), False),
        ("accuracy", (0.5,), False),
    ],
)
def test_the_report_warns_in_red(metric: str, values: tuple[float, ...], warned: bool) -> None:
    summary = a_summary(metric, *values)
    assert (no_better_than(summary["final"]) == "base") == warned
    page = render_report(summary, compose_experiment())
    assert ('role="alert"><strong>NO BETTER THAN THE BASE</strong>' in page) == warned


def test_one_answer_for_all_is_no_result() -> None:
    """A base at chance is easily beaten: 87 of 100 records are of one class, and 86.9 % right is worse than a word."""
    for value, warned in ((0.869, True), (0.87, True), (0.88, False)):
        final = a_summary("accuracy", 0.13, value)["final"] | {"figures": {"majority": 0.87}}
        assert (no_better_than(final) == "majority") == warned
        page = render_report(a_summary("accuracy", 0.13, value) | {"final": final}, compose_experiment())
        assert ('role="alert"><strong>NO BETTER THAN ONE ANSWER</strong>' in page) == warned


def test_what_was_not_measured_is_no_reason_to_warn() -> None:
    assert no_better_than(None) is None
    assert no_better_than(a_summary("accuracy", 0.5)["final"] | {"base": None, "round": 3}) is None
