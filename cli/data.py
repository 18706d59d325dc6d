"""`cloister data preview`: what the model will read and what it will learn, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import dropwhile, groupby, zip_longest
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
    "hidden_tokens",
    "length_histogram",
    "people_sentence",
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
_NAMED_TOKENS = 16


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
    from finetuning.models import load_tokenizer, stated_context
    from simulations.partition import plot_partition, who_holds_what
    from simulations.population import build_population

    experiment = compose_experiment(overrides or [])
    config, labels = experiment.data, experiment.task.labels
    population = build_population(experiment)
    parts = _chosen(population.parts, site)
    train = [row for rows in parts.values() for row in rows]
    tokenizer = load_tokenizer(experiment.model)
    context = stated_context(experiment.model)
    tokenized = TokenizedRows.joined(
        [_tokenized(f"site {name}", rows, experiment, tokenizer, context) for name, rows in parts.items()]
    )
    heldout = _tokenized("held-out records", population.heldout, experiment, tokenizer, context)
    console = Console()
    for number, example in enumerate(tokenized.examples[:examples], start=1):
        label = "" if labels is None or example.label is None else f", label {labels[example.label]}"
        title = f"example {number}: {len(example)} tokens{label}"
        console.print(rendered_example(title, _decoded_runs(example, tokenizer), hidden_tokens(example, tokenizer)))
    if examples:
        console.print(rendered_legend())
    console.print()
    where = f"site {site}" if site is not None else f"{len(parts)} sites"
    sizes = f"{len(train)} training records, {len(population.heldout)} held out in all"
    console.print(Text(f"{where}: {sizes}", style="bold"))
    for sentence in tokenized.report.sentences():
        console.print(Text(f"  {sentence}"), soft_wrap=True)
    if config.user_column is not None:
        console.print(Text(f"  {people_sentence(train, config.user_column)}"), soft_wrap=True)
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


def rendered_example(title: str, runs: Iterable[tuple[str, bool]], notes: Sequence[str] = ()) -> RenderableType:
    """Return a panel with runs of (text, learned); learned text is bracketed, read text is dim. Notes come below."""
    body = Text()
    for text, learned in runs:
        # Brackets besides the color: a file, a pipe and some eyes see none.
        shown = f"⟦{_printable(text)}⟧" if learned else _printable(text)
        body.append(shown, style=_LEARNED if learned else _READ)
    below = [Text(_printable(note), style="cyan") for note in notes]
    return Panel(Group(body, *below), title=Text(title), title_align="left")


def people_sentence(rows: Sequence[Row], column: str) -> str:
    """Return how many people `column` names, how many spellings are joined, and how many rows name nobody."""
    from finetuning.people import name_of, people_of
    from finetuning.rows import cell

    named = [row for row in rows if name_of(cell(row, column, "data.user_column")) is not None]
    nobody = len(rows) - len(named)
    refused = f"; rows that name nobody, which privacy=user_level refuses: {nobody}" if nobody else ""
    return people_of(named, column).sentence(column) + refused


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
    runs: list[tuple[str, bool]] = []
    ids: list[int] = []
    text = ""
    # Whole runs, not single tokens: half of a multi-byte character has no text of its own.
    for learned, group in groupby(pairs, key=lambda pair: pair[1]):
        run = [token for token, _ in group]
        ids += run
        longer = str(tokenizer.decode(ids))
        # After what stands before it: decoded alone, SentencePiece drops the space that a run begins with.
        runs.append((longer[len(text) :] if longer.startswith(text) else str(tokenizer.decode(run)), learned))
        text = longer
    return runs


def hidden_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a line for each run of learned or read tokens that its text does not tell.

    Other tokens may decode to the same text: `▁ ,` and `,` of SentencePiece, `</s>` as the end of a text and as four
    letters. So the tokens are named, with their ids, of each run whose text would be tokenized in another way.
    """
    lines: list[str] = []
    for learned, run in _content_runs(example, tokenizer):
        again = tokenizer(tokenizer.decode(run), add_special_tokens=False, verbose=False)["input_ids"]
        differs = next((at for at, (one, other) in enumerate(zip_longest(run, again)) if one != other), None)
        if differs is not None:
            start = max(differs - 1, 0)
            shown = run[start : start + _NAMED_TOKENS]
            pieces = zip(tokenizer.convert_ids_to_tokens(shown), shown, strict=True)
            named = " ".join(f"{piece}={token}" for piece, token in pieces)
            before, after = "... " if start else "", " ..." if start + len(shown) < len(run) else ""
            lines.append(f"{'learned' if learned else 'read'} tokens: {before}{named}{after}")
    return lines


def _content_runs(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterable[tuple[bool, list[int]]]:
    """Yield runs of learned or read tokens without the special tokens at their ends, which no text begins or ends."""
    special = {index for index in tokenizer.all_special_ids if index != tokenizer.unk_token_id}
    pairs = zip(example.input_ids.tolist(), example.trained.tolist(), strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[1]):
        run = [token for token, _ in group]
        while run and run[-1] in special:
            run.pop()
        yield learned, list(dropwhile(special.__contains__, run))


def _tokenized(
    name: str, rows: Sequence[Row], experiment: Experiment, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> TokenizedRows:
    from finetuning.batches import tokenize_as_configured
    from finetuning.rows import at_place

    with at_place(name):
        return tokenize_as_configured(rows, experiment.data, tokenizer, context=context, labels=experiment.task.labels)


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
