"""The report says what happened, hides nothing, runs nothing and loads nothing."""

import html
import re
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import pytest

from conf.schema.experiment import Experiment
from protocol.instructions import PrivacyStatement
from server.events import Evaluated, Event, RoundFinished, RoundStarted, RunFinished, RunStarted, SiteReplied
from server.plots import plots
from server.report import _bound, _number, _seconds, _size, render_report, write_report
from server.summary import summarize

SECTIONS = ("figures", "privacy", "rejected", "rounds", "reproduce")
FOUR = ("eastfield", "harbor", "millbrook", "northgate")
RECORD = "add or remove one record of a site"


def an_experiment(**changes: Any) -> Experiment:
    values: dict[str, Any] = {
        "name": "clinics",
        "strategy": {"kind": "ffa_lora"},
        "privacy": {"kind": "example_level", "target_epsilon": 8.0},
        "model": {"path": "/models/base"},
        "peft": {},
        "data": {"source": {"path": "/data/records.jsonl"}, "columns": {"kind": "text"}},
        "task": {"kind": "causal_lm"},
        "federation": {"rounds": 4},
        "runtime": {"kind": "in_process"},
        "evaluation": {},
        "logging": {},
    }
    return Experiment.model_validate(values | changes)


def a_statement(epsilon: float, **changes: Any) -> PrivacyStatement:
    values: dict[str, Any] = {
        "unit": "one record",
        "relation": RECORD,
        "epsilon_run": epsilon,
        "epsilon_total": epsilon,
        "epsilon_budget": 8.0,
        "delta": 8.333e-05,
        "accountant": "an accountant",
        "noise_multiplier": 0.42,
        "clip_norm": 1.0,
        "sampling_rate": 0.0267,
        "steps_executed": 12,
    }
    return PrivacyStatement(**(values | changes))


def unprotected(_: float) -> PrivacyStatement:
    return PrivacyStatement(unit="one record", relation=RECORD, sampling_rate=0.1, steps_executed=2)


def the_events(
    sites: tuple[str, ...] = FOUR,
    *,
    rounds: int = 4,
    state: Any = a_statement,
    evaluated: bool = True,
    metric: str = "perplexity",
    refused: dict[str, str] | None = None,
    metrics: dict[str, float] | None = None,
) -> list[Event]:
    """Return the events of a run; the sites in `refused` give that reason in every round."""
    refused = refused or {}

    def evaluation(number: int) -> list[Event]:
        value = 17.1056 / (1 + number) if metric == "perplexity" else 0.5 + 0.08 * number
        groups = {site: value * (1 + 0.01 * index) for index, site in enumerate(sites)}
        return [Evaluated(number, metric, value, 1.5, 99, groups)] if evaluated else []

    events: list[Event] = [RunStarted("20260304-101500-clinics", 4, sites, 53248), *evaluation(0)]
    for number in range(1, rounds + 1):
        events.append(RoundStarted(number, sites))
        for index, site in enumerate(sites):
            if site in refused:
                no = SiteReplied(number, site, False, 217467, 0, code="budget_exceeded", reason=refused[site])
                events.append(no)
            else:
                privacy = state(1.5 * number + 1.9998 - 0.001 * index)
                events.append(SiteReplied(number, site, True, 217467, 217000, privacy, metrics or {}))
        events += evaluation(number)
        events.append(RoundFinished(number, len(sites), 0, 2.0, 11.5, 0.001, 0.4, 0.01))
    return [*events, RunFinished("20260304-101500-clinics", 50.0, "ad" * 32)]


def the_summary(experiment: Experiment, events: list[Event], *, error: str = "") -> dict[str, Any]:
    status = "failed" if error else "finished"
    return summarize(
        experiment, events, base_digest="ba" * 32, started=datetime(2026, 3, 4, tzinfo=UTC), status=status, error=error
    )


def the_page(experiment: Experiment | None = None, events: list[Event] | None = None, *, error: str = "") -> str:
    experiment = experiment or an_experiment()
    page = render_report(the_summary(experiment, the_events() if events is None else events, error=error), experiment)
    assert "could not be drawn" not in page
    return page


def words(page: str) -> str:
    """Return the page's text as a person reads it."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


class Elements(HTMLParser):
    """Every element of a page: its tag and attributes; and that what opens also closes."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_private_run_says_what_it_came_to():
    page = the_page()
    text = words(page)
    assert "Perplexity 17.1 → 3.42 on held-out text; every site's ε ≤ 8.00 (δ ≤ 8.34×10⁻⁵)." in text
    assert "Finished" in text
    assert "2026-03-04" in text
    assert "NOT PRIVATE" not in text
    assert "INSECURE" not in text
    assert "Synthetic" not in text
    assert "Every reply was used." in text
    assert page.count("<svg") == 5
    assert [section for section in SECTIONS if f'<section id="{section}">' in page] == list(SECTIONS)


def test_the_promise_names_its_parts():
    text = words(the_page())
    for part in ("one record", RECORD, "an accountant", "8.34×10⁻⁵", "0.420", "2.67%", "and not their sum"):
        assert part in text
    assert "No site released a metric of its training" in text


def test_units_that_differ_are_shown_site_by_site():
    def state(epsilon: float) -> PrivacyStatement:
        return a_statement(epsilon, relation="another relation" if epsilon % 0.5 < 0.4993 else RECORD)

    page = the_page(events=the_events(state=state))
    assert '<th scope="col">Relation</th>' in page
    assert "<td>another relation</td>" in page


def test_reproducing_takes_the_command_the_digests_and_the_versions():
    experiment = an_experiment()
    text = words(the_page(experiment))
    assert "cloister simulate --from 20260304-101500-clinics" in text
    for part in (experiment.digest, "ba" * 32, "ad" * 32, "opacus", "53,248"):
        assert part in text
    assert '"target_epsilon": 8.0' in text


def test_a_run_without_privacy_is_loudly_not_private():
    experiment = an_experiment(privacy={"kind": "none"})
    page = the_page(experiment, the_events(state=unprotected, metrics={"training_loss": 2.0}))
    text = words(page)
    assert "NOT PRIVATE" in text
    assert "Nothing was promised" in text
    assert "privacy is off, so no ε bounds what this run reveals" in text
    assert "nothing protects the records it was trained on" in text
    assert "ε ≤" not in text
    assert page.count("<svg") == 4


def test_an_insecure_seed_voids_the_promise():
    experiment = an_experiment(privacy={"kind": "example_level", "target_epsilon": 8.0, "insecure_seed": 1234})
    text = words(the_page(experiment, the_events(state=lambda epsilon: a_statement(epsilon, insecure_seed=True))))
    assert "INSECURE SEED" in text
    assert "1234" in text
    assert "The table below is not a guarantee." in text
    assert "no ε holds" in text
    assert "every site's ε" not in text


def test_released_training_metrics_are_named_as_not_covered():
    text = words(the_page(events=the_events(metrics={"training_loss": 2.0})))
    assert "Released without noise: training loss , 16 values from eastfield, harbor, millbrook, northgate" in text


def test_demonstration_data_is_called_that():
    assert "Synthetic demonstration data" in words(the_page(an_experiment(model={"path": "embedded:clinic-base"})))
    data = {"source": {"path": "embedded:clinics"}, "columns": {"kind": "text"}}
    assert "Synthetic demonstration data" in words(the_page(an_experiment(data=data)))


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & <b>b</b>", "$x^2$"]
)
def test_what_others_wrote_is_escaped(evil: str):
    page = the_page(events=the_events((*FOUR, evil), refused={"harbor": evil}), error=evil)
    assert f"{evil}" in html.unescape(page)
    if "<" in evil:
        assert evil not in page
    tags = {tag for tag, _ in Elements(page).found}
    assert not tags & {"script", "img", "b"}


def test_after_a_lost_reply_the_stated_epsilon_is_a_lower_end():
    events = the_events()
    lost = SiteReplied(4, "harbor", False, 217467, 0, code="no_reply", reason="no reply within 60 s")
    text = words(the_page(events=[*events[:-1], lost, events[-1]]))
    assert "Largest ε at least 8.00" in text
    assert "; ε is at least 8.00, because a lost reply may have cost more than was stated." in text
    assert "This is a lower end." in text
    assert "ε is at least" not in words(the_page())
    assert "This is a lower end." not in words(the_page())


def test_replies_that_were_not_used_are_listed():
    text = words(the_page(events=the_events(refused={"harbor": "nothing is left of ε=8"})))
    assert "4 replies were not used" in text
    assert text.count("budget_exceeded nothing is left of ε=8") == 4
    assert "No statement from harbor" in text
    assert "every site that replied has ε ≤ 8.00" in text


def test_a_failed_run_says_why_and_how_far_it_came():
    events = [event for event in the_events() if getattr(event, "round", 0) < 4 and not isinstance(event, RunFinished)]
    text = words(the_page(events=[*events, RoundStarted(4, FOUR)], error="FederationError: too few replies"))
    assert "FAILED FederationError: too few replies" in text
    assert "Stopped after 3 of 4 rounds. Perplexity 17.1 → 4.28" in text
    assert "3 of 4 rounds finished" in text


@pytest.mark.parametrize("events", [[], the_events(rounds=0)[:1], [*the_events(rounds=0)[:2], RoundStarted(1, FOUR)]])
def test_a_run_that_failed_at_once_still_has_a_report(events: list[Event]):
    text = words(the_page(events=events, error="ModelError: no such file"))
    assert "Stopped before any round was finished." in text
    assert "no round was finished" in text
    assert "No site stated what it spent." in text


def test_without_evaluation_the_figures_say_so():
    page = the_page(events=the_events(evaluated=False))
    assert "Quality was not measured on held-out text" in words(page)
    assert "this run was not evaluated on held-out text" in words(page)
    assert page.count("<svg") == 3


def test_accuracy_is_a_percentage():
    text = words(the_page(events=the_events(metric="accuracy")))
    assert "Accuracy 50.0% → 82.0%" in text
    assert "higher is better" in text


def test_no_epsilon_yet_is_not_a_perfect_promise():
    nothing = the_events(refused=dict.fromkeys(FOUR, "no"))
    text = words(the_page(events=nothing, error="FederationError: no replies"))
    assert "no site stated an ε" in text
    assert "ε ≤ 0" not in text


def test_a_budget_that_was_broken_is_reported():
    text = words(the_page(events=the_events(state=lambda epsilon: a_statement(epsilon, epsilon_total=9.5))))
    assert "BUDGET EXCEEDED" in text


def test_budgets_that_differ_are_shown_as_shares():
    events = the_events(
        state=lambda epsilon: a_statement(epsilon, epsilon_budget=8.0 if epsilon % 0.5 > 0.498 else 20.0)
    )
    found = {plot.name: plot for plot in plots(the_summary(an_experiment(), events))}
    assert "% of the site" in found["epsilon"].svg


def test_a_budget_far_away_is_named_and_not_drawn():
    events = the_events(state=lambda epsilon: a_statement(epsilon, epsilon_budget=100.0))
    found = {plot.name: plot for plot in plots(the_summary(an_experiment(), events))}
    assert "more than five times what was spent" in found["epsilon"].svg


@pytest.mark.parametrize("count", [1, 6, 7, 16, 17, 64])
def test_any_number_of_sites_is_readable(count: int):
    sites = tuple(f"site-{index:02d}" for index in range(count))
    page = the_page(an_experiment(federation={"rounds": 40}), the_events(sites, rounds=40))
    assert len(page.encode()) < 500_000
    found = {plot.name: plot for plot in plots(the_summary(an_experiment(), the_events(sites)))}
    named = len(re.findall(r"<text[^>]*>[^<]*site-\d\d", found["epsilon"].svg))
    assert named == (count if count <= 6 else 1)
    assert ("median" in found["epsilon"].svg) == (count > 6)
    assert f"Show all {count} sites" in page or count <= 20
    assert all(f'<th scope="row">{site}</th>' in page for site in sites)
    assert "Show all 40 rounds" in page


@pytest.mark.parametrize("sites", [FOUR[:1], tuple(f"site-{index:02d}" for index in range(64))])
def test_the_page_loads_nothing_and_is_well_formed(sites: tuple[str, ...]):
    page = the_page(events=the_events(sites, refused={sites[-1]: "no"} if len(sites) > 1 else None))
    elements = Elements(page)
    assert elements.open == []
    assert not {tag for tag, _ in elements.found} & {"script", "link", "img", "iframe", "object", "embed"}
    for _, attributes in elements.found:
        for name in ("src", "href", "xlink:href", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert not re.search(r"https?://", page)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert '<html lang="en">' in page
    assert page.count("<table>") == page.count("<caption>")
    assert page.count('role="img"') == page.count("<svg")


def test_the_same_run_gives_the_same_page():
    assert the_page() == the_page()


def test_a_figure_that_fails_does_not_lose_the_report():
    summary = the_summary(an_experiment(), the_events())
    summary["seconds"] = None
    broken = plots(summary)[-1]
    assert broken.svg == ""
    assert "could not be drawn" in broken.caption


def test_writing_replaces_the_file_whole(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    experiment = an_experiment()
    write_report(path, the_summary(experiment, the_events()), experiment)
    assert path.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, server.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (8.0, "8.00"),
        (7.9998, "8.00"),
        (7.991, "8.00"),
        (7.99, "7.99"),
        (9.999, "10.0"),
        (8.333e-05, "8.34×10⁻⁵"),
        (2980.9, "2,990"),
        (0.0, "0"),
        (None, "–"),
        (float("inf"), "∞"),
    ],
)
def test_bounds_are_never_rounded_down(value: float | None, shown: str):
    assert _bound(value) == shown


def test_numbers_are_written_for_people():
    assert [_number(value) for value in (4.7911, 0, 1234567.0, None, float("nan"))] == [
        "4.79",
        "0",
        "1,234,567",
        "–",
        "not finite",
    ]
    assert [_size(value) for value in (1, 999, 5219208, 2.5e13)] == ["1 byte", "999 bytes", "5.22 MB", "25.0 TB"]
    assert [_seconds(value) for value in (1e-5, 33.06, 125, 4000, None)] == [
        "under 0.001 s",
        "33.1 s",
        "2 min 5 s",
        "1 h 6 min",
        "–",
    ]
