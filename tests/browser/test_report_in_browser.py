"""The report in a real browser: it renders, without a network and without a script."""

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.schema.experiment import Experiment
from protocol.instructions import PrivacyStatement
from server.events import Evaluated, Event, RoundFinished, RoundStarted, RunFinished, RunStarted, SiteReplied
from server.report import write_report
from server.summary import summarize

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 1200, 2400
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    f"--window-size={WIDTH},{HEIGHT}",
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on the PATH"),
]


def a_report(path: Path, sites: int, *, private: bool = True, error: str = "") -> Path:
    """Write the report of an invented run and return its path."""
    names = tuple(f"site-{index:02d}" for index in range(sites))
    values: dict[str, Any] = {
        "name": "browser",
        "strategy": {"kind": "ffa_lora"},
        "privacy": {"kind": "example_level", "target_epsilon": 8.0} if private else {"kind": "none"},
        "model": {"path": "/models/base"},
        "peft": {},
        "data": {"source": {"path": "/data/records.jsonl"}, "columns": {"kind": "text"}},
        "task": {"kind": "causal_lm"},
        "federation": {"rounds": 3},
        "runtime": {"kind": "in_process"},
        "evaluation": {},
        "logging": {},
    }
    experiment = Experiment.model_validate(values)
    events: list[Event] = [RunStarted("run", 3, names, 1000)]
    for number in range(4):
        if number:
            events.append(RoundStarted(number, names))
            events += [SiteReplied(number, name, True, 2000, 1900, _stated(number, private)) for name in names]
        groups = {name: 20.0 / (1 + number) + index / sites for index, name in enumerate(names)}
        events.append(Evaluated(number, "perplexity", 20.0 / (1 + number), 1.0, 9, groups))
        if number:
            events.append(RoundFinished(number, sites, 0, 1.0, 5.0, 0.1, 0.5, 0.1))
    events.append(RunFinished("run", 20.0, "ad" * 32))
    status = "failed" if error else "finished"
    summary = summarize(
        experiment, events, base_digest="ba" * 32, started=datetime(2026, 1, 2, tzinfo=UTC), status=status, error=error
    )
    write_report(path, summary, experiment)
    return path


def _stated(number: int, private: bool) -> PrivacyStatement:
    cost = {"epsilon_run": 2.0 * number, "epsilon_total": 2.0 * number, "epsilon_budget": 8.0, "delta": 1e-5}
    public = {"unit": "one record", "relation": "add or remove one record", "sampling_rate": 0.1, "steps_executed": 4}
    return PrivacyStatement(**public, **(cost if private else {}))


def browse(tmp_path: Path, page: Path, *options: str) -> str:
    """Return what the browser writes, given a page and what to do with it."""
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(BROWSER), *OPTIONS, profile, *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout


def pixels(path: Path) -> np.ndarray:
    """Return a picture as an array of shape (height, width, channels), values 0 to 1."""
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.parametrize(
    ("case", "figures", "said"),
    [
        ({"sites": 4}, 5, "every site's ε ≤ 6.00"),
        ({"sites": 64}, 5, "Show all 64 sites"),
        ({"sites": 4, "private": False}, 4, "NOT PRIVATE"),
        ({"sites": 4, "error": "FederationError: <script>document.title='broken'</script>"}, 5, "FAILED"),
    ],
    ids=["private", "64-sites", "not-private", "failed"],
)
def test_the_browser_builds_the_page_as_written(tmp_path: Path, case: dict[str, Any], figures: int, said: str):
    dom = browse(tmp_path, a_report(tmp_path / "report.html", **case), "--dump-dom")
    assert said in dom.replace("&#39;", "'")
    assert dom.count("<svg") == dom.count("</svg>") == figures
    for section in ("figures", "privacy", "rejected", "rounds", "reproduce"):
        assert f'<section id="{section}">' in dom
    assert "<script" not in dom
    assert "<title>browser – run – Cloister report</title>" in dom


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_is_visible(tmp_path: Path, dark: bool):
    shot = tmp_path / "page.png"
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(tmp_path, a_report(tmp_path / "report.html", 4), *theme, f"--screenshot={shot}")
    assert shot.read_bytes().startswith(b"\x89PNG")
    picture = pixels(shot)
    assert picture.shape[:2] == (HEIGHT, WIDTH)
    corner, gray = picture[0, 0, :3].mean(), picture[..., :3].mean(axis=2)
    assert (corner < 0.2) if dark else (corner > 0.9)
    assert 0.03 < (abs(gray - corner) > 0.2).mean() < 0.6, "text and figures stand out from the page"
    figures = gray[400:1100]
    assert (abs(figures - np.median(figures)) > 0.2).mean() > 0.01


def test_nothing_is_wider_than_a_phone(tmp_path: Path):
    """Tables scroll inside their box; the page itself does not."""
    page = a_report(tmp_path / "report.html", 4)
    probe = tmp_path / "probe.html"
    inside = (
        f'<iframe id="f" style="width:390px;height:800px;border:0" src="{page.as_uri()}" '
        "onload=\"const d=document.getElementById('f').contentDocument.documentElement;"
        "document.title=d.scrollWidth+'px'\"></iframe>"
    )
    probe.write_text(f"<!doctype html><title>none</title>{inside}")
    dom = browse(tmp_path, probe, "--allow-file-access-from-files", "--dump-dom")
    assert "<title>390px</title>" in dom
