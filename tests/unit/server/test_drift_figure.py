"""The report draws the drift where a strategy measures one, and is silent where none does."""

import math
from datetime import UTC, datetime
from typing import Any

from conf.compose import compose_experiment
from server.events import RoundFinished, RoundStarted, RunFinished, RunStarted
from server.plots import plots
from server.report import render_report
from server.summary import summarize


def the_summary(strategy: str, *drifts: float | None) -> dict[str, Any]:
    """Return the summary of a run, one round for each value of the drift."""
    events: list[Any] = [RunStarted("run", len(drifts), ("harbor",), 100)]
    for number, drift in enumerate(drifts, start=1):
        metrics = {} if drift is None else {"factor_drift": drift}
        events.append(RoundStarted(number, ("harbor",)))
        events.append(RoundFinished(number, 1, 0, 2.0, 1.0, 0.1, 0.1, 0.1, metrics=metrics))
    events.append(RunFinished("run", 9.0, "ad" * 32))
    experiment = compose_experiment([f"strategy={strategy}", "privacy=none"])
    started = datetime(2026, 3, 4, tzinfo=UTC)
    return summarize(experiment, events, base_digest="ba" * 32, started=started, status="finished")


def test_the_drift_is_a_figure_where_a_strategy_measures_it() -> None:
    summary = the_summary("fedit", 0.32, 0.1, 0.05)
    figures = plots(summary)
    assert [figure.name for figure in figures] == ["quality", "epsilon", "sites", "traffic", "drift", "time"]
    assert "could not be drawn" not in figures[4].caption
    assert "30%" in figures[4].svg
    assert "folds" not in figures[4].caption
    page = render_report(summary, compose_experiment(["strategy=fedit", "privacy=none"]))
    assert "What the mean of the factors misses" in page


def test_what_is_folded_is_not_lost() -> None:
    assert "folds it into the base" in plots(the_summary("fedex", 0.32))[4].caption


def test_without_a_measure_there_is_no_figure() -> None:
    for nothing in ((None, None), (math.nan,)):
        assert "drift" not in [figure.name for figure in plots(the_summary("ffa_lora", *nothing))]
