"""`report.html`: one run on one page, for an engineer, an organization and an auditor.

The page loads nothing: no script, no style sheet, no font, no image comes from elsewhere. Everything that a site or a
file can name (site names, reasons, errors) is escaped. Bounds (ε and δ) are rounded up, all else to the nearest.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import jinja2

from conf.schema.experiment import Experiment
from finetuning.checkpoints import write_atomically
from server.plots import plots
from server.summary import WHAT_TO_CHANGE, no_better_than, tuned_quality

__all__ = ["render_report", "write_report"]

FOLD = 20
"""Tables with more rows than this are folded."""

_MISSING = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Banner:
    """Something that a reader must not miss. `level` is danger, warning or note."""

    level: str
    title: str
    text: str


def write_report(path: Path, summary: dict[str, Any], experiment: Experiment) -> None:
    """Write the report of a run, finished or failed, as one HTML page."""
    write_atomically(path, render_report(summary, experiment).encode())


def render_report(summary: Mapping[str, Any], experiment: Experiment) -> str:
    """Return the report of a run as one HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = environment.filters
    for show in (_number, _bound, _size, _time, _percent, _measure, _plural):
        filters[show.__name__.strip("_")] = show
    rounds = summary["rounds"]
    return environment.get_template("report.html.j2").render(
        summary=summary,
        experiment=experiment,
        headline=_headline(summary, experiment),
        banners=_banners(summary, experiment),
        facts=_facts(summary, experiment),
        plots=plots(summary),
        date=_date(summary),
        statements=_statements(summary),
        own=next((part for part in summary["privacy"]["joint"] if part["unit"] != "site"), None),
        factor=_factor(summary["privacy"]["epsilon"]),
        insecure=_is_insecure(summary),
        personal=((summary["final"] or {}).get("personal") or {"groups": {}})["groups"],
        by_class=(summary["final"] or {}).get("by_class"),
        released=_released(rounds),
        rejected=[{"round": item["round"], **reply} for item in rounds for reply in item["rejected"]],
        finished=_finished(rounds),
        command=f"cloister simulate --from {shlex.quote(summary['run'] or 'RUN')}",
        fold=FOLD,
    )


def _headline(summary: Mapping[str, Any], experiment: Experiment) -> str:
    """Return what the run came to, in a sentence or two."""
    found = summary["final"]
    if found is None:
        quality = "Quality was not measured on held-out text"
    else:
        tuned, _ = tuned_quality(found)
        name, value = str(found["metric"]).capitalize(), _measure(tuned, found["metric"])
        before = "" if found["base"] is None else f"{_measure(found['base'], found['metric'])} → "
        whose = ", each site's own model" if found.get("personal") else ""
        quality = f"{name} {before}{value} on held-out text{whose}"
    sentence = f"{quality}; {_privacy_clause(summary)}."
    if summary["status"] == "finished":
        return sentence
    done, planned = len(_finished(summary["rounds"])), experiment.federation.rounds
    stopped = f"Stopped after {done} of {planned} rounds." if done else "Stopped before any round was finished."
    return f"{stopped} {sentence}" if done else stopped


def _privacy_clause(summary: Mapping[str, Any]) -> str:
    privacy = summary["privacy"]
    if privacy["kind"] == "none":
        return "nothing protects the records it was trained on"
    if _is_insecure(summary):
        return "no ε holds, because the noise came from a fixed seed"
    if privacy["kind"] == "client_level":
        clauses = [
            f"ε ≤ {_bound(part['epsilon'])} (δ ≤ {_bound(part['delta'])}) for one {part['unit']}"
            for part in privacy["joint"]
            if part["delta"]
        ]
        return " and ".join(clauses) or "no round was released"
    stated = [site for site in summary["sites"].values() if site["privacy"]]
    if not stated or not privacy["delta"]:
        return "no site stated an ε"
    if privacy["at_least"]:
        return f"ε is at least {_bound(privacy['epsilon'])}, because a lost reply may have cost more than was stated"
    whose = "every site's" if len(stated) == len(summary["sites"]) else "every site that replied has"
    return f"{whose} ε ≤ {_bound(privacy['epsilon'])} (δ ≤ {_bound(privacy['delta'])})"


def _banners(summary: Mapping[str, Any], experiment: Experiment) -> list[Banner]:
    banners: list[Banner] = []
    if summary["status"] != "finished":
        banners.append(Banner("danger", "FAILED", summary["error"] or "No reason was recorded."))
    if summary["privacy"]["kind"] == "none":
        text = (
            "Training added no noise. The adapter, and every update a site sent, can be inverted to recover text of "
            "its training records. Do not release it as if it were protected."
        )
        banners.append(Banner("danger", "NOT PRIVATE", text))
    if summary.get("stopped"):
        banners.append(Banner("warning", "ENDED EARLY", summary["stopped"]))
    if (what := no_better_than(summary["final"])) is not None:
        title, text = WHAT_TO_CHANGE[what]
        banners.append(Banner("danger", title.upper(), text))
    if _is_insecure(summary):
        text = (
            f"Noise and sampling came from the fixed seed {getattr(experiment.privacy, 'insecure_seed', None)} "
            "(privacy.insecure_seed). Whoever knows it can subtract the noise: no ε on this page is a guarantee. "
            "Use such a run to compare and to debug, never with real records."
        )
        banners.append(Banner("danger", "INSECURE SEED", text))
    if over := _over_budget(summary):
        text = f"The ledger of {', '.join(over)} holds more than the budget that the site states. Ask its operator why."
        banners.append(Banner("danger", "BUDGET EXCEEDED", text))
    embedded = [path for path in (experiment.data.source.path, experiment.model.path) if path.startswith("embedded:")]
    if embedded:
        text = (
            f"{' and '.join(embedded)}: invented records, or a small model of ours. The figures show that "
            "the machinery works; they say nothing of a real model or of real records."
        )
        banners.append(Banner("note", "Synthetic demonstration data", text))
    if count := sum(len(item["rejected"]) for item in summary["rounds"]):
        verb = "reply was" if count == 1 else "replies were"
        text = "They are listed below with their reasons. A site may have spent privacy on a reply that was not used."
        banners.append(Banner("warning", f"{count:,} {verb} not used", text))
    return banners


def _facts(summary: Mapping[str, Any], experiment: Experiment) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page: label and value."""
    privacy, found = summary["privacy"], summary["final"]
    done = len(_finished(summary["rounds"]))
    epsilon = "no bound" if privacy["kind"] == "none" else _bound(privacy["epsilon"] if privacy["delta"] else None)
    if privacy["at_least"] and privacy["delta"]:
        epsilon = f"at least {epsilon}"
    facts = [
        ("Sites", f"{len(summary['sites']):,}"),
        ("Rounds finished", f"{done:,} of {experiment.federation.rounds:,}"),
        ("Largest ε", epsilon),
        ("Trained values", f"{summary['adapter']['trained_values']:,}"),
        ("Data moved", _size(None if None in summary["bytes"].values() else sum(summary["bytes"].values()))),
        ("Time", _time(summary["seconds"])),
    ]
    if found is not None:
        facts.insert(2, (f"Last {found['metric']}", _measure(tuned_quality(found)[0], found["metric"])))
        facts += [(title, _FIGURES[title][1](value)) for title, value in _figures(found)]
    return facts


def _figures(final: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the title and the value of each figure beside the metric."""
    known = final.get("figures", {})
    return [(title, known[key]) for title, (key, _) in _FIGURES.items() if key in known]


def _time(seconds: Mapping[str, float | None]) -> str:
    """Return the time of a round, or of a whole run, or of its rounds where it ended early. That of a secret cohort
    would tell of it."""
    if not seconds:
        return _MISSING
    if seconds["train"] is None:
        return "withheld"
    return _seconds(seconds.get("total") or sum(value or 0.0 for value in seconds.values()))


def _released(rounds: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return how often each site released each metric of its training, by metric."""
    counts: dict[str, dict[str, int]] = {}
    for item in rounds:
        for site, metrics in item["metrics"].items():
            for name in metrics:
                sites = counts.setdefault(name, {})
                sites[site] = sites.get(site, 0) + 1
    return counts


def _finished(rounds: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [item for item in rounds if item["seconds"]]


def _is_insecure(summary: Mapping[str, Any]) -> bool:
    stated = (site["privacy"] or {} for site in summary["sites"].values())
    return bool(summary["privacy"]["insecure_seed"]) or any(privacy.get("insecure_seed") for privacy in stated)


def _over_budget(summary: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, privacy in _statements(summary).items()
        if privacy["epsilon_budget"] and privacy["epsilon_total"] > privacy["epsilon_budget"] * (1 + 1e-9)
    ]


def _statements(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what each site states of its privacy; a crowd by what it spent, the most first."""
    stated = {name: site["privacy"] for name, site in summary["sites"].items() if site["privacy"]}
    if len(stated) <= FOLD:
        return stated
    return dict(sorted(stated.items(), key=lambda item: (-item[1]["epsilon_run"], item[0])))


def _factor(epsilon: float | None) -> str:
    """Return e to the ε as a number that a person can read, or nothing where that is not one."""
    return f"{_bound(math.exp(epsilon))} times" if epsilon is not None and epsilon <= 20 else ""


def _date(summary: Mapping[str, Any]) -> str:
    """Return the day of a run: as stored, or as its folder's name says; empty when neither does."""
    found = re.search(r"(20\d\d)-?([01]\d)-?([0-3]\d)", str(summary.get("started") or summary["run"]))
    return "-".join(found.groups()) if found else ""


def _number(value: float | None) -> str:
    """Return a number with three significant digits and thousands separators."""
    if value is None:
        return _MISSING
    if not math.isfinite(value):
        return "not finite"
    if value and not 1e-3 <= abs(value) < 1e9:
        return _scientific(Decimal(f"{value:.2e}"))
    return f"{value:,.0f}" if abs(value) >= 999.5 or value == 0 else f"{Decimal(f'{value:.2e}'):f}"


def _bound(value: float | None) -> str:
    """Return an upper bound with three significant digits, never rounded down."""
    if value is None:
        return _MISSING
    if not math.isfinite(value):
        return "∞"
    exact = Decimal(repr(float(value)))
    if not exact:
        return "0"
    up = exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), ROUND_CEILING)
    up = Decimal(f"{up:.2e}")
    if not 1e-3 <= up < 1e9:
        return _scientific(up)
    return f"{up:,.0f}" if up >= 100 else f"{up:f}"


def _scientific(value: Decimal) -> str:
    return f"{value.scaleb(-value.adjusted()):.2f}×10{str(value.adjusted()).translate(_SUPERSCRIPT)}"


def _size(count: float | None) -> str:
    if count is None:
        return "withheld"
    if count < 1000:
        return _plural(round(count), "byte")
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{_number(count)} {unit}"
        count /= 1000
    return f"{_number(count)} TB"


def _seconds(value: float | None) -> str:
    if value is None:
        return _MISSING
    if value < 120:
        return f"{_number(value)} s" if value >= 0.001 or not value else "under 0.001 s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{_number(100 * value)}%"


def _measure(value: float | None, metric: str) -> str:
    return _percent(value) if metric == "accuracy" else _number(value)


def _plural(count: int, noun: str) -> str:
    if count == 1:
        return f"{count:,} {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") else f"{count:,} {noun}s"


_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "Most frequent class": ("majority", _percent),
    "Macro F1": ("macro_f1", _percent),
    "Calibration error": ("calibration_error", _percent),
    "Bits per byte": ("bits_per_byte", _number),
}
