"""What a plan will come to, as a table, a chart of characters, and a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from cli.tables import delta_text, epsilon_text

if TYPE_CHECKING:
    from privacy.forecast import Outlook

__all__ = ["curve_chart", "outlook_table", "plot_outlooks", "what_if_table"]

_WIDTH = 40


def outlook_table(outlooks: Sequence[Outlook], unit: str) -> Table:
    """Return one line per site."""
    table = Table(title=f"before spending: what protects one {unit}", title_justify="left")
    for heading in ("site", "published", "rate", "σ", "ε", "δ", "SNR", "of run"):
        table.add_column(heading, justify="left" if heading == "site" else "right", no_wrap=True)
    for each in outlooks:
        table.add_row(
            each.label,
            str(each.published),
            f"{each.sampling_rate:.3g}",
            _number(each.noise_multiplier),
            _epsilon(each),
            delta_text(each.delta),
            _number(each.snr_round),
            _number(each.snr_run),
            style="red" if each.problem else "",
        )
    table.caption = "σ: noise over clip norm; SNR: signal over noise of the mean update, at most"
    table.caption_justify = "left"
    return table


def what_if_table(now: Outlook, others: Sequence[Outlook]) -> Table:
    """Return what other settings would do for one site."""
    table = Table(title=f"what if, for {now.label}, SNR of the run", title_justify="left")
    for heading in ("change", "rate", "σ", "ε", "SNR", "of now"):
        table.add_column(
            heading, justify="left" if heading == "change" else "right", no_wrap=heading != "change", overflow="fold"
        )
    for each in (now, *others):
        known = each.snr_run is not None and now.snr_run is not None and 0 < now.snr_run < math.inf
        table.add_row(
            "(as it is)" if each is now else each.label,
            f"{each.sampling_rate:.3g}",
            _number(each.noise_multiplier) if not each.problem else "infeasible",
            _epsilon(each),
            _number(each.snr_run),
            f"{each.snr_run / now.snr_run:.2f} x" if known and each.snr_run is not None and now.snr_run else "–",
        )
    return table


def curve_chart(outlook: Outlook) -> str:
    """Return the ε of the rounds so far as bars of characters."""
    most = max((epsilon for _, epsilon in outlook.curve), default=0.0)
    if not 0 < most < math.inf:
        return ""
    digits = len(str(outlook.curve[-1][0]))
    lines = [
        f"  round {number:>{digits}}  {'█' * max(round(_WIDTH * epsilon / most), 1):<{_WIDTH}}  {epsilon_text(epsilon)}"
        for number, epsilon in outlook.curve
    ]
    return "\n".join([f"ε of all rounds so far, {outlook.label}", *lines])


def plot_outlooks(outlooks: Sequence[Outlook], others: Sequence[Outlook], path: Path) -> None:
    """Write a figure: ε over the rounds of each site, and σ against the signal-to-noise ratio of each change."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for each in outlooks:
        if each.curve:
            left.plot(*zip(*each.curve, strict=True), marker="o", label=each.label)
    left.set(xlabel="round", ylabel="ε of all rounds so far", title="cost", ylim=(0, None))
    if any(each.curve for each in outlooks):
        left.legend()
    changes = [each for each in others if each.snr_run is not None and math.isfinite(each.snr_run)]
    right.barh([each.label for each in changes], [each.snr_run or 0.0 for each in changes])
    right.set(xlabel="signal-to-noise ratio of the run, at most", title="what if")
    right.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if math.isfinite(value) else "∞"


def _epsilon(outlook: Outlook) -> str:
    return "none" if outlook.epsilon == math.inf else epsilon_text(outlook.epsilon)
