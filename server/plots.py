"""The report's figures, as inline SVG that follows the page's colors and fonts.

Colors are written as placeholders and replaced by CSS variables, so that a figure is legible on a light page, on a dark
one and on paper. Text stays text: it can be searched, read aloud and translated.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FEW", "Plot", "plots"]

FEW = 6
"""Up to this many sites each have a color and a label; beyond, the crowd is gray and two lines stand out."""

_LABELLED_SITES = 16
_BAR_ROUNDS = 30
_NAME = 20
_HALF, _WIDE = (5.4, 3.5), (11.2, 2.0)

_INK, _MUTED, _GRID, _CROWD = "#010101", "#010102", "#010103", "#010104"
_SERIES = ("#020201", "#020202", "#020203", "#020204", "#020205", "#020206")
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _CROWD: "--crowd"} | {
    color: f"--s{index}" for index, color in enumerate(_SERIES, 1)
}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _GRID,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}

Line = tuple[Sequence[int], Sequence[float]]
End = tuple[str, float, str]


@dataclass(frozen=True)
class Plot:
    """A figure and how to read it; without data `svg` is empty and `caption` says why."""

    name: str
    title: str
    caption: str
    svg: str = ""
    wide: bool = False


def plots(summary: Mapping[str, Any]) -> tuple[Plot, ...]:
    """Return the report's figures, in order."""
    return tuple(_drawn(figure, summary) for figure in (_quality, _epsilon, _sites, _traffic, _time))


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
    whole = _line([(number, found["value"]) for number, found in evaluated])
    if not whole[0]:
        return Plot(name, title, "Left out: this run was not evaluated on held-out text.")
    groups = sorted({group for _, found in evaluated for group in found["groups"]})
    lines = {
        group: line
        for group in (groups if len(groups) > 1 else ())
        if (line := _line([(number, found["groups"].get(group)) for number, found in evaluated]))[0]
    }
    metric = str(final["metric"])
    higher = metric == "accuracy"

    def paint(axes: Axes) -> None:
        ends = _paint_lines(axes, lines, _best_and_worst(lines, higher), markers=True)
        axes.plot(*whole, color=_INK, linewidth=2.4, marker="o", markersize=4.5, zorder=5)
        values = [value for line in (whole, *lines.values()) for value in line[1]]
        if higher:
            axes.yaxis.set_major_formatter(_percent)
        elif min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_short)
            axes.yaxis.set_minor_formatter(_short)
        _rounds_axis(axes)
        axes.set_ylabel(f"{metric} (%)" if higher else metric)
        _label_ends(axes, [("all held-out text", whole[1][-1], _INK), *ends])

    crowd = f" {len(lines)} groups in gray; the best and the worst are named." if len(lines) > FEW else ""
    caption = (
        f"{metric.capitalize()} after each evaluated round, round 0 being the base without an adapter: "
        f"{'higher' if higher else 'lower'} is better.{crowd}"
    )
    return Plot(name, title, caption, _draw(name, f"{metric} per round", _HALF, paint))


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
        site: _carried([(number, value / scale[site]) for number, value in points], last)
        for site, points in sorted(spent.items())
    }

    def paint(axes: Axes) -> None:
        ends = _paint_lines(axes, lines, _most_and_median(lines), markers=last <= _BAR_ROUNDS)
        _paint_limit(axes, limit, max(line[1][-1] for line in lines.values()), share=share)
        if share:
            axes.yaxis.set_major_formatter(_percent)
        _rounds_axis(axes)
        axes.set_ylabel("ε of this run, % of the site's budget" if share else "ε of this run (no unit)")
        _label_ends(axes, ends)

    crowd = f" {len(lines)} sites in gray; the median is dashed." if len(lines) > FEW else ""
    budget = " No site states a budget." if limit is None else " The dotted line is what sites allow at most."
    caption = f"ε grows whenever a site takes part, and never shrinks: lower is more private.{budget}{crowd}"
    return Plot(name, title, caption, _draw(name, "ε of each site per round", _HALF, paint))


def _sites(summary: Mapping[str, Any]) -> Plot:
    name, title = "sites", "Quality at each site, first and last"
    pairs = {
        site: (found["quality"]["first"], found["quality"]["last"])
        for site, found in summary["sites"].items()
        if found["quality"] and all(map(_finite, found["quality"].values()))
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
        (axes.hlines if few else axes.vlines)(places, first, last, color=_CROWD, linewidth=2, zorder=1)
        for values, label, face in ((first, "first evaluation", "none"), (last, "last evaluation", _SERIES[0])):
            points = (values, places) if few else (places, values)
            size = 42 if few else 16
            axes.scatter(*points, s=size, facecolor=face, edgecolor=_SERIES[0], linewidth=1.4, label=label, zorder=2)
        measured, sites = (axes.xaxis, axes.yaxis) if few else (axes.yaxis, axes.xaxis)
        sites.set_ticks(list(places) if few else [], labels=[_cut(site) for site in order] if few else [])
        sites.grid(False)
        if not few:
            axes.set_xlabel(f"{len(order)} sites, worst to best after the last evaluation")
        if higher:
            measured.set_major_formatter(_percent)
        measured.set_label_text(f"{metric} (%)" if higher else metric)
        axes.margins(0.06, 0.08)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderpad=0, handletextpad=0.2)

    shown = [f"{_cut(site)} {_percent(pairs[site][1]) if higher else _short(pairs[site][1])}" for site in order]
    crowd = "" if few else f" Best: {', '.join(shown[:-4:-1])}. Worst: {', '.join(shown[:3])}."
    caption = (
        f"One line per site, from its first evaluation to its last: {'higher' if higher else 'lower'} {metric} is "
        f"better, and a long line means that much changed.{crowd}"
    )
    height = max(_HALF[1], 0.27 * len(order) + 1.0) if few else _HALF[1]
    return Plot(name, title, caption, _draw(name, f"{metric} of each site", (_HALF[0], height), paint))


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
        for shift, color, (label, way) in zip((-0.2, 0.2), _SERIES, ways.items(), strict=False):
            values = [item["bytes"][way] / 1000**power for item in summary["rounds"]]
            if len(numbers) <= _BAR_ROUNDS:
                axes.bar([number + shift for number in numbers], values, width=0.36, color=color, label=label)
            else:
                axes.plot(numbers, values, color=color, linewidth=1.6, label=label)
        axes.set_ylim(bottom=0)
        _rounds_axis(axes)
        axes.set_ylabel(f"all sites together ({unit})")
        axes.grid(False, axis="x")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderpad=0)

    caption = "Instructions sent to all sites of a round, and the replies that came back; retries are not counted."
    return Plot(name, title, caption, _draw(name, "bytes sent and received per round", _HALF, paint))


def _time(summary: Mapping[str, Any]) -> Plot:
    name, title = "time", "Where the time went"
    seconds = summary["seconds"]
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
        for (phase, spent), color in zip(phases.items(), _SERIES, strict=False):
            share = f"{spent / total:.1%}" if spent >= 0.0005 * total else "under 0.1%"
            label = f"{phase}: {_short(spent)} s ({share})"
            axes.barh([0], [spent], left=left, color=color, height=0.7, label=label)
            left += spent
        axes.set_xlim(0, total)
        axes.set_yticks([])
        axes.set_xlabel("seconds on the server's clock")
        axes.xaxis.set_major_formatter(_short)
        axes.grid(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderpad=0, columnspacing=2.2)

    caption = (
        "The whole run, split by what the server was doing; training includes the way to the sites and back. "
        "A phase too short to be seen is named with its seconds."
    )
    return Plot(name, title, caption, _draw(name, "seconds by phase", _WIDE, paint), wide=True)


def _paint_lines(axes: Axes, lines: Mapping[str, Line], chosen: Mapping[str, Line], *, markers: bool) -> list[End]:
    """Draw few lines in color, or a gray crowd with the chosen ones on top; return label, height and color of ends."""
    few = len(lines) <= FEW
    for xs, ys in () if few else lines.values():
        axes.plot(xs, ys, color=_CROWD, linewidth=0.8)
    ends: list[End] = []
    for (label, (xs, ys)), color in zip((lines if few else chosen).items(), _SERIES, strict=False):
        style = "--" if label == "median" else "-"
        axes.plot(xs, ys, style, color=color, linewidth=1.7, marker="o" if markers else "", markersize=3.5, zorder=3)
        ends.append((label if not few else _cut(label), ys[-1], color))
    return ends


def _best_and_worst(lines: Mapping[str, Line], higher: bool) -> dict[str, Line]:
    order = sorted(lines, key=lambda name: lines[name][1][-1], reverse=higher)
    return {f"best: {_cut(order[0])}": lines[order[0]], f"worst: {_cut(order[-1])}": lines[order[-1]]} if order else {}


def _most_and_median(lines: Mapping[str, Line]) -> dict[str, Line]:
    most = max(lines, key=lambda name: lines[name][1][-1])
    columns = zip(*(ys for _, ys in lines.values()), strict=True)
    return {f"most: {_cut(most)}": lines[most], "median": (lines[most][0], [median(column) for column in columns])}


def _paint_limit(axes: Axes, limit: float | None, highest: float, *, share: bool) -> None:
    axes.set_ylim(0, 1.12 * max(highest, 1e-9))
    if limit is None:
        return
    text = "each site's budget" if share else f"budget {limit:.3g}"
    if limit > 5 * highest:
        far = f"{text}: more than five times what was spent, above this figure"
        axes.text(0.01, 0.97, far, transform=axes.transAxes, va="top", fontsize=8.5, color=_MUTED)
        return
    axes.set_ylim(0, 1.12 * max(highest, limit))
    axes.axhline(limit, color=_INK, linewidth=1.3, linestyle=":")
    where = ("axes fraction", "data")
    axes.annotate(text, (0.01, limit), xycoords=where, xytext=(0, 3), textcoords="offset points", fontsize=8.5)


def _label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Name lines at their right end, moved apart where they would overlap."""
    axes.set_ylim(*axes.get_ylim())  # from here the scale stays: places below are in parts of the axes
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = sorted((float(to_axes.transform((1.0, height))[1]), label, color) for label, height, color in ends)
    gap, places = 0.062, [height for height, _, _ in heights]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + gap)
    overflow = max(places[-1] - 1.0, 0.0)
    for index in reversed(range(len(places))):
        above = places[index + 1] - gap if index + 1 < len(places) else places[index] - overflow
        places[index] = min(places[index], above)
    for place, (height, label, color) in zip(places, heights, strict=True):
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 1.2, "shrinkB": 0, "relpos": (0, 0.5), "patchA": None}
        where = ("axes fraction", "axes fraction")
        axes.annotate(
            label,
            (1.0, height),
            xytext=(1.045, place),
            xycoords=where,
            textcoords=where,
            va="center",
            fontsize=9,
            arrowprops=arrow,
            annotation_clip=False,
        )


def _rounds_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlabel("round")


def _line(points: Sequence[tuple[int, Any]]) -> Line:
    usable = [(number, value) for number, value in points if _finite(value)]
    return [number for number, _ in usable], [value for _, value in usable]


def _carried(points: Sequence[tuple[int, float]], last: int) -> Line:
    """Return one value for every round from 0 on: a site that did not take part keeps what it had."""
    known, values = dict(points), [0.0]
    for number in range(1, last + 1):
        values.append(known.get(number, values[-1]))
    return list(range(last + 1)), values


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _cut(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 8]}…{name[-7:]}"


def _percent(value: float, _position: object = None) -> str:
    return f"{100 * value:.3g}%"


def _short(value: float, _position: object = None) -> str:
    return (
        f"{value:.3g}" if 1e-3 <= abs(value) < 1000 or not value else f"{value:,.0f}" if value >= 1 else "under 0.001"
    )


def _draw(name: str, description: str, size: tuple[float, float], paint: Callable[[Axes], None]) -> str:
    """Return a figure as an SVG element: no pyplot, no window, and nothing of the reader's own matplotlib settings."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name, description)


def _inline(document: str, name: str, description: str) -> str:
    """Return the SVG element of a document, fit to stand beside others in one page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", document[document.index("<svg") :], flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    view = re.search(r'viewBox="([^"]*)"', opening)
    rest = re.sub(r"<style.*?</style>", "", rest, flags=re.DOTALL)  # would hold for the whole page
    rest = re.sub(r"font-family: [^;\"]*;", "", rest)
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", rest).replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        rest = rest.replace(color, f"var({variable})")
    label = escape(description, quote=True)
    start = f'<svg viewBox="{view[1] if view else ""}" role="img" aria-labelledby="{name}-title">'
    return f'{start}<title id="{name}-title">{label}</title>{rest.strip()}'
