"""How the report's figures are drawn: inline SVG that follows the page's colors and fonts.

Colors are written as placeholders and replaced by CSS variables, so that a figure is legible on a light page, on a dark
one and on paper. Text stays text: it can be searched, read aloud and translated.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "CROWD",
    "FEW",
    "HALF",
    "INK",
    "MUTED",
    "SERIES",
    "WIDE",
    "End",
    "Line",
    "carried",
    "cut",
    "draw",
    "is_finite",
    "label_ends",
    "line_of",
    "paint_lines",
    "percent",
    "rounds_axis",
    "short",
]

FEW = 6
"""Up to this many sites each have a color and a label; beyond, the crowd is gray and two lines stand out."""

_NAME = 20
HALF, WIDE = (5.4, 3.5), (11.2, 2.0)

INK, MUTED, _GRID, CROWD = "#010101", "#010102", "#010103", "#010104"
SERIES = ("#020201", "#020202", "#020203", "#020204", "#020205", "#020206")
_VARIABLES = {INK: "--ink", MUTED: "--muted", _GRID: "--grid", CROWD: "--crowd"} | {
    color: f"--s{index}" for index, color in enumerate(SERIES, 1)
}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}

Line = tuple[Sequence[int], Sequence[float]]
End = tuple[str, float, str]


def paint_lines(axes: Axes, lines: Mapping[str, Line], chosen: Mapping[str, Line], *, markers: bool) -> list[End]:
    """Draw few lines in color, or a gray crowd with the chosen ones on top; return label, height and color of ends."""
    few = len(lines) <= FEW
    for xs, ys in () if few else lines.values():
        axes.plot(xs, ys, color=CROWD, linewidth=0.8)
    ends: list[End] = []
    for (label, (xs, ys)), color in zip((lines if few else chosen).items(), SERIES, strict=False):
        style = "--" if label == "median" else "-"
        axes.plot(xs, ys, style, color=color, linewidth=1.7, marker="o" if markers else "", markersize=3.5, zorder=3)
        ends.append((label if not few else cut(label), ys[-1], color))
    return ends


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
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


def rounds_axis(axes: Axes) -> None:
    """Mark whole rounds on the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlabel("round")


def line_of(points: Sequence[tuple[int, Any]]) -> Line:
    """Return rounds and values of the points whose value is a finite number."""
    usable = [(number, value) for number, value in points if is_finite(value)]
    return [number for number, _ in usable], [value for _, value in usable]


def carried(points: Sequence[tuple[int, float]], last: int) -> Line:
    """Return one value for every round from 0 on: a site that did not take part keeps what it had."""
    known, values = dict(points), [0.0]
    for number in range(1, last + 1):
        values.append(known.get(number, values[-1]))
    return list(range(last + 1)), values


def is_finite(value: object) -> bool:
    """Return whether something is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def cut(name: str) -> str:
    """Return a name that fits beside a figure."""
    return name if len(name) <= _NAME else f"{name[: _NAME - 8]}…{name[-7:]}"


def percent(value: float, _position: object = None) -> str:
    """Return a share as a percentage; the second argument is what matplotlib passes to a formatter."""
    return f"{100 * value:.3g}%"


def short(value: float, _position: object = None) -> str:
    """Return a number of three digits; the second argument is what matplotlib passes to a formatter."""
    return (
        f"{value:.3g}" if 1e-3 <= abs(value) < 1000 or not value else f"{value:,.0f}" if value >= 1 else "under 0.001"
    )


def draw(name: str, description: str, size: tuple[float, float], paint: Callable[[Axes], None]) -> str:
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
