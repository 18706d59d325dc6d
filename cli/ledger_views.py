"""A ledger for a terminal, and its burn-down as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cli.tables import delta_text, epsilon_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from privacy.ledger.chain import Entry
    from privacy.ledger.summary import DataSetSpending, LedgerSummary
    from privacy.ledger.verification import Verification

__all__ = ["burn_down_figure", "entries_table", "entry_summary", "spending_views", "verification_lines"]

_BAR, _SPARK = 40, "█▇▆▅▄▃▂▁ "


def spending_views(summary: LedgerSummary) -> list[RenderableType]:
    """Return the budget, and per data set its spending, its runs, and a burn-down."""
    if summary.budget is None:
        return [Text("no budget yet; run: cloister ledger init")]
    budget = summary.budget
    views: list[RenderableType] = [
        Text(f"budget   ε={budget.epsilon:g} at δ={budget.delta:.3g}, per {budget.unit}, over all runs"),
        Text(f"relation {summary.relation}"),
    ]
    if not summary.data_sets:
        views.append(Text("nothing is booked"))
    for data in summary.data_sets:
        views += [_data_line(data), _burn_down(data, budget.epsilon), _runs_table(data)]
    return views


def _data_line(data: DataSetSpending) -> Text:
    shared = f", shares units with {len(data.shares_units_with)} other(s), counted here" * bool(data.shares_units_with)
    rule = "exact, one declared schedule" if data.spent.rule == "schedule" else "Rényi filter"
    return Text(
        f"data     {data.fingerprint[:12]}: ε={epsilon_text(data.spent.epsilon)} spent ({rule}), "
        f"{data.left:.2f} left{shared}"
    )


def _burn_down(data: DataSetSpending, budget: float) -> Text:
    """Return what is left as a bar, and how it came to be as one character per reservation (the latest ones)."""
    full = round(_BAR * min(1.0, data.left / budget))
    left = [max(0.0, 1 - point.epsilon / point.budget) for point in data.points[-_BAR:]]
    spark = "".join(_SPARK[round((1 - share) * (len(_SPARK) - 1))] for share in left)
    bar = Text("left     ")
    bar.append("█" * full, style="green" if data.left > budget / 4 else "yellow")
    bar.append("░" * (_BAR - full), style="dim")
    bar.append(f"\nburn     {spark}")
    return bar


def _runs_table(data: DataSetSpending) -> Table:
    table = Table(title="runs", title_justify="left")
    for heading in ("run", "reservations", "not committed", "steps", "ε alone"):
        table.add_column(
            heading, justify="left" if heading == "run" else "right", no_wrap=heading == "ε alone", overflow="fold"
        )
    for run in data.runs:
        table.add_row(
            Text(run.run), str(run.reservations), str(run.uncommitted or ""), str(run.steps), epsilon_text(run.epsilon)
        )
    return table


def entries_table(entries: Sequence[Entry], total: int) -> Table:
    """Return one line per entry."""
    table = Table(title=f"entries ({len(entries)} of {total})", title_justify="left")
    for heading in ("#", "at", "kind", "what", "hash"):
        folds = heading in ("what", "at")
        table.add_column(heading, justify="right" if heading == "#" else "left", no_wrap=not folds, overflow="fold")
    for entry in entries:
        table.add_row(str(entry.sequence), entry.at[:19], entry.kind, Text(entry_summary(entry)), entry.hash[:12])
    return table


def entry_summary(entry: Entry) -> str:
    """Return what an entry says, in a line."""
    from privacy.mechanisms import SubsampledGaussian

    content = entry.content
    if entry.kind == "budget":
        return (
            f"ε={content['epsilon']:g} at δ={delta_text(content['delta'])} per {content['unit']}: {content['reason']}"
        )
    if entry.kind == "commit":
        return f"of entry {content['reserve']}, output {content['output_digest'][:12]}"
    mechanism = SubsampledGaussian.from_json(content["mechanism"])
    parameters = f"{mechanism.steps} steps, q={mechanism.sampling_rate:.4g}, σ={mechanism.noise_multiplier:.4g}"
    if entry.kind == "schedule":
        return f"run {content['run']}, whole: {parameters}"
    again = f", attempt {content['attempt']}" if content["attempt"] > 1 else ""
    after = epsilon_text(content["epsilon_after"])
    return f"run {content['run']}, round {content['round']}{again}: {parameters} → ε={after} ({content['rule']})"


def verification_lines(found: Verification) -> list[str]:
    """Return what a passed verification looked at."""
    lines = [f"{found.entries} entries hold: hashes, order, signatures, data sets"]
    if found.figures:
        schedules = sum(figure.rule == "schedule" for figure in found.figures)
        lines.append(
            f"{len(found.figures)} stated ε recomputed, with rule and lower bound: {schedules} of declared schedules, "
            f"also against Rényi DP from above; {len(found.figures) - schedules} of the filter, also by integration"
        )
    lines.append(f"head     {found.head}")
    lines.append("note the head: entries cut off later show only against it (--head)")
    return lines


def burn_down_figure(summary: LedgerSummary) -> Figure:
    """Return the budget that is left after each reservation, one line per data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for data in summary.data_sets:
        at = [data.points[0].sequence - 1, *(point.sequence for point in data.points)]
        left = [data.points[0].budget, *(max(0.0, point.budget - point.epsilon) for point in data.points)]
        axes.step(at, left, where="post", marker=".", label=f"data set {data.fingerprint[:8]}")
    if summary.data_sets:
        axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("entry")
    axes.set_ylabel("ε left of the budget")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure
