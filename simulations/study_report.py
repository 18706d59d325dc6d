"""A study's results as a picture and as text: for each place, quality against what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from simulations.study_cells import Line

__all__ = ["Point", "markdown_of", "plot_lines", "plot_sites", "points_of"]

_MARKERS = "os^Dv*PX"
_TOLERATED = 0.01
"""Of the quality that float32 reaches."""


@dataclass(frozen=True)
class Point:
    """One line of a table: a variant at a place and an ε, over its seeds, at the best of the rates that were tried."""

    place: str
    variant: str
    epsilon: float
    metric: str
    base: float | None
    quality: float | None
    """Mean over seeds; None where all were refused."""
    spread: float
    """From the best seed to the worst."""
    seeds: int
    megabytes: float
    """Both ways, all rounds and sites."""
    bits: float
    """Per value of an update."""
    groups: dict[str, float]
    """Mean over seeds, by site."""
    refused: str


def points_of(lines: Sequence[Line]) -> list[Point]:
    """Return the points in the order of the lines.

    The best rate is chosen on the records that quality is measured on: with several rates all figures are a little too
    good, alike for all variants.
    """
    found: dict[tuple[str, str, float], list[Line]] = {}
    for line in lines:
        found.setdefault((_place(line), _variant(line), line.epsilon), []).append(line)
    return [_point(*key, lines) for key, lines in found.items()]


def _place(line: Line) -> str:
    return f"{line.data}, {line.partition}" + (f", {line.sites} sites" if line.sites else "")


def _variant(line: Line) -> str:
    codec = line.codec if line.study == "bits" else ""
    ranks = f"ranks {line.ranks}" if line.ranks else ""
    return " ".join(part for part in (line.strategy if line.study != "bits" else "", codec, ranks) if part)


def _point(place: str, variant: str, epsilon: float, lines: Sequence[Line]) -> Point:
    by_rate: dict[float, list[Line]] = {}
    for line in lines:
        if line.quality is not None:
            by_rate.setdefault(line.learning_rate, []).append(line)
    if not by_rate:
        return Point(place, variant, epsilon, "", None, None, 0.0, 0, 0.0, 0.0, {}, lines[0].refused)
    sign = 1 if _is_better_low(next(iter(by_rate.values()))[0].metric) else -1
    best = min(by_rate.values(), key=lambda several: sign * mean(_qualities(several)))
    values = _qualities(best)
    bases = [line.base for line in best if line.base is not None]
    sites = sorted({site for line in best for site in line.quality_of})
    return Point(
        place,
        variant,
        epsilon,
        best[0].metric,
        mean(bases) if bases else None,
        mean(values),
        max(values) - min(values),
        len(values),
        mean((line.bytes_moved or 0) for line in best) / 1e6,
        mean((line.bits_per_value or 0) for line in best),
        {site: mean(line.quality_of[site] for line in best if site in line.quality_of) for site in sites},
        "",
    )


def _qualities(lines: Iterable[Line]) -> list[float]:
    return [line.quality for line in lines if line.quality is not None]


def _is_better_low(metric: str) -> bool:
    return metric in ("perplexity", "loss")


def markdown_of(points: Sequence[Point], study: str) -> str:
    """Return a paragraph and a table for each place, ready to be pasted into a document."""
    parts = [_PARAGRAPHS[study](points), ""]
    for place in dict.fromkeys(point.place for point in points):
        parts += [f"**{place}**", "", *_TABLES[study]([point for point in points if point.place == place]), ""]
    reasons = dict.fromkeys(f"{point.variant}, {point.place}: {point.refused}" for point in points if point.refused)
    return "\n".join([*parts, *(f"- refused: {reason}" for reason in reasons)]).strip() + "\n"


def _strategies_paragraph(points: Sequence[Point]) -> str:
    told: list[str] = []
    for place, epsilon, here in _panels(points):
        best = _best(here)
        told.append(f"{place}, {_privacy(epsilon)}: {best.variant} with {_figure(best)} for {best.megabytes:.3g} MB")
    return f"The best {_metric(points)} on held-out records, {_seeds(points)}: " + _joined(told)


def _bits_paragraph(points: Sequence[Point]) -> str:
    told: list[str] = []
    for place, epsilon, here in _panels(points):
        whole = next((point for point in here if point.variant == "none"), None)
        if whole is None or whole.quality is None:
            continue
        enough = [point for point in here if _loss(point, whole) <= _TOLERATED]
        least = min(enough, key=lambda point: point.bits)
        told.append(
            f"{place}, {_privacy(epsilon)}: {least.variant} at {least.bits:.2f} bits per value ends at "
            f"{_figure(least)}, float32 at {_figure(whole)}"
        )
    intro = f"The fewest bits per value that lose at most {_TOLERATED:.0%} of {_metric(points)}, {_seeds(points)}: "
    return intro + _joined(told)


def _panels(points: Sequence[Point]) -> Iterator[tuple[str, float, list[Point]]]:
    """Yield each place and ε with the points that ran there."""
    for place, epsilon in dict.fromkeys((point.place, point.epsilon) for point in points):
        here = [each for each in points if (each.place, each.epsilon) == (place, epsilon) and each.quality is not None]
        if here:
            yield place, epsilon, here


def _joined(told: Sequence[str]) -> str:
    return ("; ".join(told) or "nothing ran") + "."


def _loss(point: Point, whole: Point) -> float:
    assert point.quality is not None
    assert whole.quality is not None
    change = point.quality / whole.quality - 1
    return change if _is_better_low(point.metric) else -change


def _ranks_paragraph(points: Sequence[Point]) -> str:
    told = [
        f"{point.variant}, {_privacy(point.epsilon)}: {_figure(point)}" for point in points if point.quality is not None
    ]
    return f"The global adapter's {_metric(points)} by ranks, {_seeds(points)}: " + _joined(told)


def _strategies_table(points: Sequence[Point]) -> list[str]:
    return _cost_table(points, "strategy | MB", lambda point: f"{point.megabytes:.3g}")


def _bits_table(points: Sequence[Point]) -> list[str]:
    return _cost_table(points, "codec | bits per value", lambda point: f"{point.bits:.2f}")


def _cost_table(points: Sequence[Point], heading: str, cost: Callable[[Point], str]) -> list[str]:
    epsilons = list(dict.fromkeys(point.epsilon for point in points))
    rows = [f"| {heading} |" + "".join(f" {_privacy(each)} |" for each in epsilons)]
    rows.append("|---|---:|" + "---:|" * len(epsilons))
    for variant in dict.fromkeys(point.variant for point in points):
        own = {point.epsilon: point for point in points if point.variant == variant}
        costly = max(own.values(), key=lambda point: point.megabytes)
        cells = "".join(f" {_figure(own.get(each))} |" for each in epsilons)
        rows.append(f"| {variant} | {'–' if costly.refused else cost(costly)} |{cells}")
    return rows


def _ranks_table(points: Sequence[Point]) -> list[str]:
    sites = sorted({site for point in points for site in point.groups})
    rows = ["| strategy and ranks | privacy | MB | all |" + "".join(f" {site} |" for site in sites)]
    rows.append("|---|---|---:|---:|" + "---:|" * len(sites))
    for point in points:
        moved = "–" if point.refused else f"{point.megabytes:.3g}"
        by_site = "".join(f" {point.groups[site]:.3g} |" if site in point.groups else " – |" for site in sites)
        rows.append(f"| {point.variant} | {_privacy(point.epsilon)} | {moved} | {_figure(point)} |{by_site}")
    return rows


_PARAGRAPHS: dict[str, Callable[[Sequence[Point]], str]] = {
    "strategies": _strategies_paragraph,
    "bits": _bits_paragraph,
    "ranks": _ranks_paragraph,
}
_TABLES: dict[str, Callable[[Sequence[Point]], list[str]]] = {
    "strategies": _strategies_table,
    "bits": _bits_table,
    "ranks": _ranks_table,
}


def _best(points: Sequence[Point]) -> Point:
    sign = 1 if _is_better_low(points[0].metric) else -1
    return min(points, key=lambda point: sign * (point.quality if point.quality is not None else math.inf))


def _figure(point: Point | None) -> str:
    if point is None or point.quality is None:
        return "–" if point is None else "refused"
    return f"{point.quality:.3g}" + (f" ± {point.spread / 2:.2g}" if point.seeds > 1 else "")


def _privacy(epsilon: float) -> str:
    return "no privacy" if math.isinf(epsilon) else f"ε = {epsilon:g}"


def _metric(points: Sequence[Point]) -> str:
    named = list(dict.fromkeys(point.metric for point in points if point.metric))
    return (
        " or ".join(f"{each} ({'lower' if _is_better_low(each) else 'higher'} is better)" for each in named)
        or "quality"
    )


def _seeds(points: Sequence[Point]) -> str:
    most = max((point.seeds for point in points), default=0)
    return "one run each, so small differences mean nothing" if most <= 1 else f"means and half ranges of {most} seeds"


def plot_lines(points: Sequence[Point], path: Path, *, against: str) -> Path:
    """Draw a panel per place, quality against `megabytes` or `bits`: a color per variant, a marker per ε."""
    drawn = [point for point in points if point.quality is not None]
    places = list(dict.fromkeys(point.place for point in drawn)) or [""]
    variants = list(dict.fromkeys(point.variant for point in drawn))
    epsilons = list(dict.fromkeys(point.epsilon for point in drawn))
    figure, panels = _figure_of(len(places))
    for axes, place in zip(panels, places, strict=True):
        here = [point for point in drawn if point.place == place]
        for point in here:
            color = f"C{variants.index(point.variant) % 10}"
            marker = _MARKERS[epsilons.index(point.epsilon) % len(_MARKERS)]
            face = color if variants.index(point.variant) < 10 else "none"
            where = getattr(point, against)
            axes.errorbar(where, point.quality, point.spread / 2, fmt=marker, color=color, markerfacecolor=face)
        _dress(axes, place, here, "bits per value of an update" if against == "bits" else "MB, both ways, all sites")
        if here:
            _plain_log(axes, "x")
    handles = [_handle(name, f"C{i % 10}", "s", filled=i < 10) for i, name in enumerate(variants)]
    handles += [_handle(_privacy(each), "black", _MARKERS[i % len(_MARKERS)]) for i, each in enumerate(epsilons)]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def plot_sites(points: Sequence[Point], path: Path) -> Path:
    """Draw a panel per place and ε: each site's quality, a line per variant."""
    drawn = [point for point in points if point.groups]
    panels_of = list(dict.fromkeys((point.place, point.epsilon) for point in drawn)) or [("", math.inf)]
    variants = list(dict.fromkeys(point.variant for point in drawn))
    figure, panels = _figure_of(len(panels_of))
    for axes, (place, epsilon) in zip(panels, panels_of, strict=True):
        here = [point for point in drawn if (point.place, point.epsilon) == (place, epsilon)]
        for point in here:
            color, sites = f"C{variants.index(point.variant) % 10}", sorted(point.groups)
            axes.plot(sites, [point.groups[site] for site in sites], "o-", color=color)
        _dress(axes, f"{place}, {_privacy(epsilon)}", here, "the global adapter on the records of")
        axes.tick_params(axis="x", rotation=30)
    handles = [_handle(name, f"C{i % 10}", "o") for i, name in enumerate(variants)]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def _figure_of(panels: int) -> tuple[Any, list[Any]]:
    # The figure is built without pyplot: no global state, and no window on a machine without a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure: Any = Figure(figsize=(2.4 + 3.6 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def _dress(axes: Any, title: str, points: Sequence[Point], below: str) -> None:
    axes.set_title(title, fontsize="small")
    axes.set_xlabel(below)
    axes.set_ylabel(points[0].metric if points else "quality")
    if points and _is_better_low(points[0].metric):
        _plain_log(axes, "y")


def _plain_log(axes: Any, axis: str) -> None:
    """Make an axis logarithmic, with ordinary numbers at its ticks."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    getattr(axes, f"set_{axis}scale")("log")
    chosen = getattr(axes, f"{axis}axis")
    low, high = getattr(axes, f"get_{axis}lim")()
    chosen.set_major_formatter(StrMethodFormatter("{x:g}"))
    # Less than a power of ten has few major ticks, more has too many minor ones.
    chosen.set_minor_formatter(StrMethodFormatter("{x:g}") if high / low < 10 else NullFormatter())
    chosen.set_tick_params(which="both", labelsize="small")


def _handle(label: str, color: str, marker: str, *, filled: bool = True) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], linestyle="", marker=marker, color=color, markerfacecolor=color if filled else "none", label=label
    )
