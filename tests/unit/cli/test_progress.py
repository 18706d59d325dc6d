"""The live display and the plain lines, fed with events."""

import io

import pytest
from rich.console import Console

from cli.progress import PlainLines, RoundsDisplay, progress_for
from cli.tables import byte_text, delta_text, epsilon_text, quality_text
from conf.compose import compose_experiment
from protocol.instructions import PrivacyStatement
from server.events import Evaluated, Event, RoundFinished, RoundStarted, RunFinished, RunStarted, SiteReplied


def statement(epsilon: float) -> PrivacyStatement:
    return PrivacyStatement(
        unit="one record",
        relation="add or remove one record",
        epsilon_run=epsilon,
        epsilon_total=epsilon,
        epsilon_budget=8.0,
        delta=1e-5,
        sampling_rate=0.1,
        steps_executed=1,
    )


EVENTS: list[Event] = [
    RunStarted("run-1", 2, ("north", "south"), 100),
    Evaluated(0, "perplexity", 20.0, 3.0, 10, {}),
    RoundStarted(1, ("north", "south")),
    SiteReplied(1, "north", True, 1000, 900, statement(1.234), {"training_loss": 2.5}),
    SiteReplied(1, "south", False, 1000, 0, code="not_finite", reason="w holds NaN or infinity"),
    RoundFinished(1, 1, 1, 0.5, 2.0, 0.1, 0.0, 0.1),
]


def screen(display: object, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(display)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_display_shows_sites_epsilon_bytes_and_problems() -> None:
    display = RoundsDisplay("demo")
    problems: list[str] = []
    display.on_problem = problems.append
    assert "preparing sites" in screen(display)
    for event in EVENTS:
        display.observe(event)
    text = screen(display)
    north = next(line for line in text.splitlines() if "north" in line)
    assert "round 1 done" in north
    assert "1.24" in north, "ε is rounded up"
    assert "8.00" in north
    assert "2.500" in north
    assert "1.0 KB" in north
    south = next(line for line in text.splitlines() if "south" in line)
    assert "not_finite" in south
    assert "withheld" in south
    assert "1/2 rounds" in text
    assert "perplexity 20.00 after round 0" in text
    assert problems == ["round 1: south not used: not_finite, w holds NaN or infinity"]


def test_display_stays_small_with_many_sites() -> None:
    display = RoundsDisplay("demo")
    display.observe(RunStarted("run", 1, tuple(f"site-{n}" for n in range(64)), 1))
    assert "and 44 more" in screen(display)


def test_plain_lines() -> None:
    console = Console(file=io.StringIO(), width=200)
    lines = PlainLines(console)
    for event in [*EVENTS, RunFinished("run-1", 12.3, "d")]:
        lines.observe(event)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "run run-1: 2 rounds, 2 sites: north, south" in text
    assert "round 1: south not used: not_finite, w holds NaN or infinity" in text
    assert "round 1 of 2: 1 replies" in text
    assert "north 1.24 of 8.00" in text
    assert "finished in 12.3 s" in text


def test_plain_lines_of_a_secret_cohort_tell_no_times() -> None:
    console = Console(file=io.StringIO(), width=200)
    lines = PlainLines(console)
    finished = RoundFinished(1, None, None, 0.5, None, None, 2.0, None)
    for event in (EVENTS[0], finished, RunFinished("run-1", None, "d")):
        lines.observe(event)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "round 1 of 2: replies withheld; sent withheld, received withheld\nfinished\n" in text


@pytest.mark.parametrize(("wanted", "expected"), [("auto", "run run-1"), ("plain", "run run-1"), ("none", "")])
def test_where_there_is_no_terminal(wanted: str, expected: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    with progress_for(compose_experiment([f"logging.progress={wanted}"]), console) as observe:
        observe(EVENTS[0])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith(expected)
    assert bool(text) == bool(expected)


def test_numbers_for_people() -> None:
    assert epsilon_text(7.9911) == "8.00"
    assert epsilon_text(None) == "–"
    assert delta_text(8.333e-5) == "8.4e-05"
    assert delta_text(1e-5) == "1.0e-05"
    assert delta_text(None) == "–"
    assert byte_text(999) == "999 B"
    assert byte_text(217_467) == "217.5 KB"
    assert byte_text(5e9) == "5.0 GB"
    assert quality_text("accuracy", 0.8932) == "89.3%"
    assert quality_text("perplexity", 4.7911) == "4.79"
