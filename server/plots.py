"""The report's figures: what each shows, and how to read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from server.drawing import (
    CROWD,
    FEW,
    HALF,
    INK,
    MUTED,
    SERIES,
    WIDE,
    Line,
    carried,
    cut,
    draw,
    is_finite,
    label_ends,
    line_of,
    paint_lines,
    percent,
    rounds_axis,
    short,
)
from strategies.lora.drift import DRIFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Plot", "plots"]

_LABELLED_SITES = 16
_BAR_ROUNDS = 30


@dataclass(frozen=True)
class Plot:
    """A figure and how to read it; without data `svg` is empty and `caption` says why."""

    name: str
    title: str
    caption: str
    svg: str = ""
    wide: bool = False


def plots(summary: Mapping[str, Any]) -> tuple[Plot, ...]:
    """Return the report's figures, in order; that of the drift where the strategy measures one."""
    drift = (_drift,) if _drift_line(summary)[0] else ()
    return tuple(_drawn(figure, summary) for figure in (_quality, _epsilon, _sites, _traffic, *drift, _time))


def _drawn(figure: Callable[[Mapping[str, Any]], Plot], summary: Mapping[str, Any]) -> Plot:
    """Return a figure; one that cannot be drawn is no reason to lose a report, or to call a finished run failed."""
    try:
        return figure(summary)
    except Exception as error:
        name = figure.__name__.strip("_")
        return Plot(name, name.capitalize(), f"Left out: it could not be drawn ({type(error).__name__}: {error}).")


def _quality(summary: Mapping[str, Any]) -> Plot:
    name, title = "quality", "Quality on held-out text"
    evaluated = [(item["round"], item["evaluation"]) for item in summary["rounds"] if item["evaluation"]]
    final = summary["final"] or {}
    if final.get("base") is not None:
        base = {"value": final["base"], "groups": final.get("base_groups") or {}}
        evaluated.insert(0, (0, base))
    whole = line_of([(number, found["value"]) for number, found in evaluated])
    if not whole[0]:
        return Plot(name, title, "Left out: this run was not evaluated on held-out text.")
    groups = sorted({group for _, found in evaluated for group in found["groups"]})
    lines = {
        group: line
        for group in (groups if len(groups) > 1 else ())
        if (line := line_of([(number, found["groups"].get(group)) for number, found in evaluated]))[0]
    }
    metric = str(final["metric"])
    higher = metric == "accuracy"

    def paint(axes: Axes) -> None:
        ends = paint_lines(axes, lines, _best_and_worst(lines, higher), markers=True)
        axes.plot(*whole, color=INK, linewidth=2.4, marker="o", markersize=4.5, zorder=5)
        values = [value for line in (whole, *lines.values()) for value in line[1]]
        if higher:
            axes.yaxis.set_major_formatter(percent)
        elif min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(short)
            axes.yaxis.set_minor_formatter(short)
        rounds_axis(axes)
        axes.set_ylabel(f"{metric} (%)" if higher else metric)
        label_ends(axes, [("all held-out text", whole[1][-1], INK), *ends])

    crowd = f" {len(lines)} groups in gray; the best and the worst are named." if len(lines) > FEW else ""
    caption = (
        f"{metric.capitalize()} after each evaluated round, round 0 being the base without an adapter: "
        f"{'higher' if higher else 'lower'} is better.{crowd}"
    )
    if personal := final.get("personal"):
        shown = percent(personal["value"]) if higher else short(personal["value"])
        caption += f" It is of the shared part alone; with what each site keeps, its own model, it came to {shown}."
    return Plot(name, title, caption, draw(name, f"{metric} per round", HALF, paint))


def _epsilon(summary: Mapping[str, Any]) -> Plot:
    name, title = "epsilon", "Privacy spent, site by site"
    if summary["privacy"]["kind"] == "none":
        return Plot(name, title, "Left out: privacy is off, so no ε bounds what this run reveals.")
    spent: dict[str, list[tuple[int, float]]] = {}
    for item in summary["rounds"]:
        for site, epsilon in item["epsilon"].items():
            spent.setdefault(site, [(0, 0.0)]).append((item["round"], epsilon))
    if not spent:
        return Plot(name, title, "Left out: no site's reply was used, so no site stated an ε.")
    statements = {site: (summary["sites"].get(site) or {}).get("privacy") or {} for site in spent}
    budgets = {site: statement.get("epsilon_budget") for site, statement in statements.items()}
    known = {budget for budget in budgets.values() if budget}
    share = len(known) > 1 and all(budgets.values())
    limit = 1.0 if share else min(known, default=None)
    last = max(item["round"] for item in summary["rounds"])
    scale = {site: (budget or 1.0) if share else 1.0 for site, budget in budgets.items()}
    lines = {
        site: carried([(number, value / scale[site]) for number, value in points], last)
        for site, points in sorted(spent.items())
    }

    def paint(axes: Axes) -> None:
        ends = paint_lines(axes, lines, _most_and_median(lines), markers=last <= _BAR_ROUNDS)
        _paint_limit(axes, limit, max(line[1][-1] for line in lines.values()), share=share)
        if share:
            axes.yaxis.set_major_formatter(percent)
        rounds_axis(axes)
        axes.set_ylabel("ε of this run, % of the site's budget" if share else "ε of this run (no unit)")
        label_ends(axes, ends)

    crowd = f" {len(lines)} sites in gray; the median is dashed." if len(lines) > FEW else ""
    budget = " No site states a budget." if limit is None else " The dotted line is what sites allow at most."
    caption = f"ε grows whenever a site takes part, and never shrinks: lower is more private.{budget}{crowd}"
    return Plot(name, title, caption, draw(name, "ε of each site per round", HALF, paint))


def _sites(summary: Mapping[str, Any]) -> Plot:
    name, title = "sites", "Quality at each site, first and last"
    personal = ((summary["final"] or {}).get("personal") or {"groups": {}})["groups"]
    pairs = {
        site: (found["quality"]["first"], personal.get(site, found["quality"]["last"]))
        for site, found in summary["sites"].items()
        if found["quality"] and all(map(is_finite, found["quality"].values()))
    }
    if not pairs:
        reason = "the held-out text is not split by site" if summary["final"] else "this run was not evaluated"
        return Plot(name, title, f"Left out: {reason}.")
    metric = str(summary["final"]["metric"])
    higher = metric == "accuracy"
    order = sorted(pairs, key=lambda site: pairs[site][1], reverse=not higher)
    few = len(order) <= _LABELLED_SITES

    def paint(axes: Axes) -> None:
        places = range(len(order))
        first, last = [pairs[site][0] for site in order], [pairs[site][1] for site in order]
        (axes.hlines if few else axes.vlines)(places, first, last, color=CROWD, linewidth=2, zorder=1)
        for values, label, face in ((first, "first evaluation", "none"), (last, "last evaluation", SERIES[0])):
            points = (values, places) if few else (places, values)
            size = 42 if few else 16
            axes.scatter(*points, s=size, facecolor=face, edgecolor=SERIES[0], linewidth=1.4, label=label, zorder=2)
        measured, sites = (axes.xaxis, axes.yaxis) if few else (axes.yaxis, axes.xaxis)
        sites.set_ticks(list(places) if few else [], labels=[cut(site) for site in order] if few else [])
        sites.grid(False)
        if not few:
            axes.set_xlabel(f"{len(order)} sites, worst to best after the last evaluation")
        if higher:
            measured.set_major_formatter(percent)
        measured.set_label_text(f"{metric} (%)" if higher else metric)
        axes.margins(0.06, 0.08)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderpad=0, handletextpad=0.2)

    shown = [f"{cut(site)} {percent(pairs[site][1]) if higher else short(pairs[site][1])}" for site in order]
    crowd = "" if few else f" Best: {', '.join(shown[:-4:-1])}. Worst: {', '.join(shown[:3])}."
    caption = (
        f"One line per site, from its first evaluation to its last: {'higher' if higher else 'lower'} {metric} is "
        f"better, and a long line means that much changed.{crowd}"
    )
    if personal:
        caption += " The last is that of the site's own model."
    height = max(HALF[1], 0.27 * len(order) + 1.0) if few else HALF[1]
    return Plot(name, title, caption, draw(name, f"{metric} of each site", (HALF[0], height), paint))


def _traffic(summary: Mapping[str, Any]) -> Plot:
    name, title = "traffic", "Data moved per round"
    numbers = [item["round"] for item in summary["rounds"]]
    ways = {"to sites": "down", "from sites": "up"}
    most = max((item["bytes"][way] or 0 for item in summary["rounds"] for way in ways.values()), default=0)
    if not most:
        return Plot(name, title, "Left out: nothing was sent, or secret cohorts keep it to themselves.")
    power = min(int(math.log10(most)) // 3, 4)
    unit = ("bytes", "KB", "MB", "GB", "TB")[power]

    def paint(axes: Axes) -> None:
        for shift, color, (label, way) in zip((-0.2, 0.2), SERIES, ways.items(), strict=False):
            values = [item["bytes"][way] / 1000**power for item in summary["rounds"]]
            if len(numbers) <= _BAR_ROUNDS:
                axes.bar([number + shift for number in numbers], values, width=0.36, color=color, label=label)
            else:
                axes.plot(numbers, values, color=color, linewidth=1.6, label=label)
        axes.set_ylim(bottom=0)
        rounds_axis(axes)
        axes.set_ylabel(f"all sites together ({unit})")
        axes.grid(False, axis="x")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderpad=0)

    caption = "Instructions sent to all sites of a round, and the replies that came back; retries are not counted."
    return Plot(name, title, caption, draw(name, "bytes sent and received per round", HALF, paint))


def _drift(summary: Mapping[str, Any]) -> Plot:
    name, title = "drift", "What the mean of the factors misses"
    rounds, values = _drift_line(summary)

    def paint(axes: Axes) -> None:
        markers = "o" if len(rounds) <= _BAR_ROUNDS else ""
        axes.plot(rounds, values, color=SERIES[0], linewidth=1.7, marker=markers, markersize=3.5)
        axes.set_ylim(0, 1.12 * max(*values, 1e-9))
        axes.yaxis.set_major_formatter(percent)
        rounds_axis(axes)
        axes.set_ylabel("% of the mean product")

    kept = " This strategy folds it into the base, so nothing is lost." if summary["strategy"] == "fedex" else ""
    caption = (
        "How far the product of the averaged factors is from the average of the sites' products, relative to the "
        f"latter, round by round (factor_drift): lower is better, and at 0 averaging A and B apart costs nothing.{kept}"
    )
    return Plot(name, title, caption, draw(name, "drift of the factors per round", WIDE, paint), wide=True)


def _drift_line(summary: Mapping[str, Any]) -> Line:
    return line_of([(item["round"], item["strategy_metrics"].get(DRIFT)) for item in summary["rounds"]])


def _time(summary: Mapping[str, Any]) -> Plot:
    name, title = "time", "Where the time went"
    seconds = summary["seconds"]
    if seconds["train"] is None:
        return Plot(name, title, "Left out: it would tell how many sites were in a secret cohort.", wide=True)
    keys = {"training at sites": "train", "aggregation": "aggregate", "evaluation": "evaluate", "other work": "other"}
    phases = {phase: seconds.get(key) or 0.0 for phase, key in keys.items()}
    measured = sum(phases.values())
    if measured <= 0:
        return Plot(name, title, "Left out: no round was finished.", wide=True)
    if (seconds.get("total") or 0.0) > measured:
        phases["before and after the rounds"] = seconds["total"] - measured
    total = sum(phases.values())

    def paint(axes: Axes) -> None:
        left = 0.0
        for (phase, spent), color in zip(phases.items(), SERIES, strict=False):
            share = f"{spent / total:.1%}" if spent >= 0.0005 * total else "under 0.1%"
            label = f"{phase}: {short(spent)} s ({share})"
            axes.barh([0], [spent], left=left, color=color, height=0.7, label=label)
            left += spent
        axes.set_xlim(0, total)
        axes.set_yticks([])
        axes.set_xlabel("seconds on the server's clock")
        axes.xaxis.set_major_formatter(short)
        axes.grid(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderpad=0, columnspacing=2.2)

    caption = (
        "The whole run, split by what the server was doing; training includes the way to the sites and back. "
        "A phase too short to be seen is named with its seconds."
    )
    return Plot(name, title, caption, draw(name, "seconds by phase", WIDE, paint), wide=True)


def _best_and_worst(lines: Mapping[str, Line], higher: bool) -> dict[str, Line]:
    order = sorted(lines, key=lambda name: lines[name][1][-1], reverse=higher)
    return {f"best: {cut(order[0])}": lines[order[0]], f"worst: {cut(order[-1])}": lines[order[-1]]} if order else {}


def _most_and_median(lines: Mapping[str, Line]) -> dict[str, Line]:
    most = max(lines, key=lambda name: lines[name][1][-1])
    columns = zip(*(ys for _, ys in lines.values()), strict=True)
    return {f"most: {cut(most)}": lines[most], "median": (lines[most][0], [median(column) for column in columns])}


def _paint_limit(axes: Axes, limit: float | None, highest: float, *, share: bool) -> None:
    axes.set_ylim(0, 1.12 * max(highest, 1e-9))
    if limit is None:
        return
    text = "each site's budget" if share else f"budget {limit:.3g}"
    if limit > 5 * highest:
        far = f"{text}: more than five times what was spent, above this figure"
        axes.text(0.01, 0.97, far, transform=axes.transAxes, va="top", fontsize=8.5, color=MUTED)
        return
    axes.set_ylim(0, 1.12 * max(highest, limit))
    axes.axhline(limit, color=INK, linewidth=1.3, linestyle=":")
    where = ("axes fraction", "data")
    axes.annotate(text, (0.01, limit), xycoords=where, xytext=(0, 3), textcoords="offset points", fontsize=8.5)
