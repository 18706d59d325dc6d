"""`cloister data preview`: what the model will read and what it will learn, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cli.paths import at_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from conf.schema.data import DataConfig
    from conf.schema.experiment import Experiment
    from finetuning.batches import Example, TokenizedRows
    from finetuning.rows import Row

__all__ = [
    "app",
    "length_histogram",
    "percentile",
    "preview",
    "rendered_example",
    "rendered_holdings",
    "rendered_legend",
]

# No locals in tracebacks: they hold private records.
app = typer.Typer(
    no_args_is_help=True,
    help="Look at the data before anything is trained on it.",
    pretty_exceptions_show_locals=False,
)

_LEARNED = "bold green"
_READ = "dim"
_BAR_WIDTH = 40


@app.callback()
def _group() -> None:  # keeps `preview` a command of its own while it is the only one
    """Look at the data before anything is trained on it."""


@app.command()
def preview(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OVERRIDES]...", help="GROUP=NAME or PATH=VALUE, for example data=jsonl_chat"),
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="tokenized examples to print")] = 3,
    site: Annotated[str | None, typer.Option(help="only the records of this site; all sites if not given")] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=at_home, help="draw who holds what as .svg, .png or .pdf")
    ] = None,
) -> None:
    """Print tokenized examples (learned tokens in ⟦green⟧), their lengths, and who holds what."""
    from conf.compose import compose_experiment
    from finetuning.batches import TokenizedRows
    from finetuning.labels import label_legend
    from finetuning.models import load_tokenizer
    from simulations.partition import plot_partition, who_holds_what
    from simulations.population import build_population

    experiment = compose_experiment(overrides or [])
    config, labels = experiment.data, experiment.task.labels
    population = build_population(experiment)
    parts = _chosen(population.parts, site)
    train = [row for rows in parts.values() for row in rows]
    tokenizer = load_tokenizer(experiment.model)
    tokenized = TokenizedRows.joined(
        [_tokenized(f"site {name}", rows, experiment, tokenizer) for name, rows in parts.items()]
    )
    heldout = _tokenized("held-out records", population.heldout, experiment, tokenizer)
    console = Console()
    for number, example in enumerate(tokenized.examples[:examples], start=1):
        label = "" if labels is None or example.label is None else f", label {labels[example.label]}"
        title = f"example {number}: {len(example)} tokens{label}"
        console.print(rendered_example(title, _decoded_runs(example, tokenizer)))
    if examples:
        console.print(rendered_legend())
    console.print()
    where = f"site {site}" if site is not None else f"{len(parts)} sites"
    sizes = f"{len(train)} training records, {len(population.heldout)} held out in all"
    console.print(Text(f"{where}: {sizes}", style="bold"))
    for sentence in tokenized.report.sentences():
        console.print(Text(f"  {sentence}"), soft_wrap=True)
    for sentence in heldout.report.sentences()[1:]:
        console.print(Text(f"  held out: {sentence}"), soft_wrap=True)
    if config.columns.kind == "labelled" and labels is not None:
        legend = label_legend(train, config.columns.label, labels)
        if legend is not None:
            console.print(Text(f"  {legend}"), soft_wrap=True)
    console.print(length_histogram([len(example) for example in tokenized.examples]))
    column = _telling_column(config)
    held = who_holds_what(population.parts, column)
    console.print(rendered_holdings(column, held.sites, held.values, held.counts))
    if plot is not None:
        console.print(Text(f"wrote {plot_partition(population.parts, column, plot)}"))


def rendered_example(title: str, runs: Iterable[tuple[str, bool]]) -> RenderableType:
    """Return a panel with runs of (text, learned); learned text is bracketed, read text is dim."""
    body = Text()
    for text, learned in runs:
        # Brackets besides the color: a file, a pipe and some eyes see none.
        shown = f"⟦{_printable(text)}⟧" if learned else _printable(text)
        body.append(shown, style=_LEARNED if learned else _READ)
    return Panel(body, title=Text(title), title_align="left")


def rendered_legend() -> Text:
    """Return the key to the colors of `rendered_example`."""
    return Text.assemble(("⟦learned⟧", _LEARNED), " - ", ("read, not learned", _READ))


def length_histogram(lengths: Sequence[int], *, buckets: int = 8) -> RenderableType:
    """Return bars of sequence lengths in at most `buckets` ranges, titled with the median, 90 % and longest."""
    ordered = sorted(lengths)
    title = "tokens per example"
    if ordered:
        title += f": p50 {percentile(ordered, 50)}, p90 {percentile(ordered, 90)}, max {ordered[-1]}"
    table = Table(box=None, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    if not ordered:
        return _titled(title, table)
    width = -(-(ordered[-1] - ordered[0] + 1) // buckets)
    counts = [0] * (-(-(ordered[-1] - ordered[0] + 1) // width))
    for length in ordered:
        counts[(length - ordered[0]) // width] += 1
    for index, count in enumerate(counts):
        low = ordered[0] + index * width
        span = f"{low}" if width == 1 else f"{low}-{low + width - 1}"
        # A bucket that is not empty shows at least one block.
        bar = "█" * max(round(_BAR_WIDTH * count / max(counts)), min(count, 1))
        table.add_row(span, Text(bar, style="cyan"), str(count))
    return _titled(title, table)


def percentile(ordered: Sequence[int], percent: int) -> int:
    """Return the smallest value that at least `percent` percent of the ascending values do not exceed.

    >>> percentile([1, 2, 3, 10], 50)
    2
    """
    return ordered[max(-(-len(ordered) * percent // 100) - 1, 0)]


def rendered_holdings(
    column: str | None, sites: Sequence[str], values: Sequence[str], counts: Sequence[Sequence[int]]
) -> RenderableType:
    """Return the table of `counts[site][value]`, with a total per site where there is more than one value."""
    title = "records per site" if column is None else f"records per site and {column}"
    table = Table()
    table.add_column("site", no_wrap=True, min_width=max(map(len, sites), default=0))
    has_total = len(values) > 1
    for value in (*values, *(("total",) if has_total else ())):
        table.add_column(Text(_printable(value)), justify="right")
    for site, row in zip(sites, counts, strict=True):
        totals = (str(sum(row)),) if has_total else ()
        table.add_row(Text(_printable(site)), *map(str, row), *totals)
    return _titled(title, table)


def _titled(title: str, table: Table) -> Group:
    # A line of its own: rich wraps a table's title to the width of the table.
    return Group(Text(f"\n{title}", style="bold"), table)


def _printable(text: str) -> str:
    """Data may hold terminal escape sequences: show every control character instead of obeying it."""
    return "".join(mark if mark.isprintable() or mark in "\n\t" else "\N{REPLACEMENT CHARACTER}" for mark in text)


def _decoded_runs(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    pairs = zip(example.input_ids.tolist(), example.trained.tolist(), strict=True)
    # Whole runs, not single tokens: half of a multi-byte character has no text of its own.
    return [
        (str(tokenizer.decode([token for token, _ in run])), learned)
        for learned, run in groupby(pairs, key=lambda pair: pair[1])
    ]


def _tokenized(
    name: str, rows: Sequence[Row], experiment: Experiment, tokenizer: PreTrainedTokenizerBase
) -> TokenizedRows:
    from finetuning.batches import tokenize_rows
    from finetuning.rows import at_place

    config = experiment.data
    with at_place(name):
        return tokenize_rows(
            rows,
            config.columns,
            tokenizer,
            max_length=config.max_length,
            train_on=config.train_on,
            truncation=config.truncation,
            labels=experiment.task.labels,
        )


def _chosen(parts: Mapping[str, Sequence[Row]], site: str | None) -> Mapping[str, Sequence[Row]]:
    from finetuning.rows import nearest
    from protocol.errors import DataError

    if site is None:
        return parts
    if site not in parts:
        raise DataError(f"no site {site!r}{nearest(site, parts)}; sites: {', '.join(list(parts)[:20])}; change --site")
    return {site: parts[site]}


def _telling_column(config: DataConfig) -> str | None:
    """Return the column whose values show best how sites differ."""
    if config.partition.kind == "dirichlet":
        return config.partition.label
    return config.columns.label if config.columns.kind == "labelled" else None
