"""What a run comes to, as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from simulations.studies import Baseline
    from simulations.study_robustness import Result

__all__ = [
    "baseline_table",
    "byte_text",
    "delta_text",
    "epsilon_text",
    "figure_line",
    "outcome_table",
    "person_text",
    "quality_text",
    "record_lines",
    "robustness_table",
    "sweep_table",
]


_SCOPE = {
    True: "of the server's noise, for a whole site",
    False: "the largest of any site, for a unit that lives at one",
}


def outcome_table(summary: dict[str, Any]) -> Table:
    """Return one line per site and one for the federation: quality before and after, ε, bytes."""
    final = summary["final"]
    metric = final["metric"] if final else "quality"
    personal: dict[str, Any] = (final or {}).get("personal") or {"value": None, "groups": {}}
    table = Table(title=f"{metric} on held-out records", title_justify="left")
    for heading in ("site", "base", "tuned", "ε", "of", "δ", "sent", "received"):
        # Names fold where the terminal is narrow; a figure that lost its last digit would be another figure.
        table.add_column(
            heading, justify="left" if heading == "site" else "right", no_wrap=heading != "site", overflow="fold"
        )
    for name, site in summary["sites"].items():
        quality, privacy = site["quality"] or {}, site["privacy"] or {}
        table.add_row(
            name,
            quality_text(metric, quality.get("first")),
            quality_text(metric, personal["groups"].get(name, quality.get("last"))),
            epsilon_text(privacy.get("epsilon_run") if privacy.get("delta") else None),
            epsilon_text(privacy.get("epsilon_budget")),
            delta_text(privacy.get("delta")),
            byte_text(site["bytes"]["up"]),
            byte_text(site["bytes"]["down"]),
        )
    table.add_section()
    joint = summary["privacy"]["joint"]
    first, *others = joint or [summary["privacy"]]
    table.add_row(
        "all" if len(joint) < 2 else f"all, per {first['unit']}",
        quality_text(metric, final["base"] if final else None),
        quality_text(metric, _tuned(final)),
        epsilon_text(first["epsilon"]),
        "",
        delta_text(first["delta"]),
        byte_text(summary["bytes"]["up"]),
        byte_text(summary["bytes"]["down"]),
        style="bold",
    )
    for other in others:
        table.add_row(
            f"all, per {other['unit']}", "", "", epsilon_text(other["epsilon"]), "", delta_text(other["delta"])
        )
    table.caption = "ε of all: " + "; ".join(_SCOPE[part["unit"] == "site"] for part in joint or [first])
    table.caption += person_text(joint or [first])
    if personal["groups"]:
        table.caption += "\ntuned: each site's own model, the shared part and what that site keeps"
    table.caption_justify = "left"
    return table


def record_lines(summary: dict[str, Any]) -> list[str]:
    """Return what became of the rows of simulated sites, one line for each thing that happened to any of them."""
    records: dict[str, dict[str, int]] = summary["records"] or {}
    told = {
        "truncated": "rows cut to the longest sequence",
        "left_out": "rows left out, with nothing to learn (empty, or cut before the completion)",
        "special_tokens": "special tokens of the model in the text of records",
        "merged": "rows whose prompt ends inside a token",
    }
    lines: list[str] = []
    for key, sentence in told.items():
        found = {site: counts[key] for site, counts in records.items() if counts[key]}
        if found:
            named = ", ".join(f"{site} {count}" for site, count in list(found.items())[:10])
            more = ", ..." if len(found) > 10 else ""
            lines.append(f"records  {sum(found.values())} {sentence}: {named}{more}")
    return lines


def figure_line(summary: dict[str, Any]) -> str:
    """Return what held-out records say beside the metric; empty where nothing was measured."""
    figures: dict[str, float] = (summary["final"] or {}).get("figures", {})
    told = {
        "majority": ("always the most frequent class", "{:.1%}"),
        "macro_f1": ("macro F1", "{:.1%}"),
        "calibration_error": ("calibration error", "{:.1%}"),
        "bits_per_byte": ("bits per byte", "{:.3f}"),
    }
    return ", ".join(f"{name} {form.format(figures[key])}" for key, (name, form) in told.items() if key in figures)


def _tuned(final: dict[str, Any] | None) -> float | None:
    """Return the quality of what sites use: their own models, where they keep a part of them."""
    return None if final is None else (final.get("personal") or final)["value"]


def person_text(joint: Sequence[dict[str, Any]]) -> str:
    """Return ε for a person known at several sites, for each protected unit; empty for one."""
    several = joint[0].get("sites_per_person", 1)
    if several == 1:
        return ""
    figures = ", ".join(epsilon_text(part["epsilon_over_sites"]) for part in joint)
    return f"; of a person known at up to {several} sites: {figures}"


def sweep_table(runs: Sequence[tuple[tuple[str, ...], dict[str, Any]]]) -> Table:
    """Return one line per job of a sweep, named by the overrides in which the jobs differ."""
    shared = set.intersection(*(set(job) for job, _ in runs))
    table = Table(title="sweep", title_justify="left")
    for heading in ("overrides", "metric", "base", "result", "ε", "sent", "seconds"):
        names = heading in ("overrides", "metric")
        table.add_column(heading, justify="left" if names else "right", no_wrap=not names, overflow="fold")
    for job, summary in runs:
        final: dict[str, Any] = summary["final"] or {"metric": "–", "base": None, "value": None}
        table.add_row(
            " ".join(override for override in job if override not in shared),
            final["metric"],
            quality_text(final["metric"], final["base"]),
            quality_text(final["metric"], _tuned(final)),
            epsilon_text(summary["privacy"]["epsilon"]),
            byte_text(summary["bytes"]["up"]),
            "withheld" if summary["seconds"]["total"] is None else f"{summary['seconds']['total']:.1f}",
        )
    return table


def baseline_table(lines: Sequence[Baseline]) -> Table:
    """Return the comparison of `cloister study baselines`."""
    metric = lines[0].metric
    groups = list(lines[0].groups)
    table = Table(title=f"{metric} on the same held-out records", title_justify="left")
    for heading in ("trained on", "all", "ε", *groups):
        named = heading == "trained on"
        table.add_column(heading, justify="left" if named else "right", no_wrap=not named, overflow="fold")
    for line in lines:
        table.add_row(
            line.label,
            quality_text(metric, line.value),
            epsilon_text(line.epsilon),
            *(quality_text(metric, line.groups.get(group)) for group in groups),
            style="bold" if line.label.startswith("federated, private") else "",
        )
    return table


def quality_text(metric: str, value: float | None) -> str:
    """Return a metric for people: accuracy as percent, perplexity with two decimals."""
    if value is None:
        return "–"
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.2f}"


def epsilon_text(value: float | None) -> str:
    """Return ε for people, rounded up: a rounded promise must not sound better than the kept one."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{math.ceil(value * 100) / 100:.2f}"


def delta_text(value: float | None) -> str:
    """Return δ for people with two digits, rounded up like ε."""
    if not value:
        return "–"
    exponent = math.floor(math.log10(value)) - 1
    return f"{math.ceil(value / 10**exponent - 1e-9) * 10**exponent:.1e}"


def byte_text(count: float | None) -> str:
    """Return a number of bytes with a decimal unit; None is what a secret cohort keeps to itself."""
    if count is None:
        return "withheld"
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def robustness_table(results: Sequence[Result]) -> Table:
    """Return one line per rule and a column per attack: quality, and the backdoor's success where there is any."""
    metric = next((each.metric for each in results if each.metric), "quality")
    columns = list(dict.fromkeys((each.attack, each.fraction) for each in results))
    table = Table(title=f"{metric} on held-out records under attack", title_justify="left")
    table.add_column("rule", no_wrap=True)
    for attack, fraction in columns:
        table.add_column(attack if not fraction else f"{attack} {fraction:.0%}", justify="right")
    by_cell = {(each.rule, each.attack, each.fraction): each for each in results}
    for rule in dict.fromkeys(each.rule for each in results):
        table.add_row(rule, *(_robustness_cell(metric, by_cell.get((rule, *column))) for column in columns))
    reasons = dict.fromkeys(each.refused for each in results if each.refused)
    table.caption = "in brackets: triggered records that the backdoor answers" + "".join(f"\n{why}" for why in reasons)
    return table


def _robustness_cell(metric: str, result: Result | None) -> str:
    if result is None:
        return ""
    if result.quality is None:
        return "refused"
    success = result.backdoor_success or 0.0
    return quality_text(metric, result.quality) + (f" ({success:.0%})" if success else "")
