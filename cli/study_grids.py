"""`cloister study strategies`, `bits` and `ranks`: grids of runs that answer a question each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.paths import at_home

if TYPE_CHECKING:
    from simulations.study_cells import Cell, Line
    from simulations.study_grids import Grid

__all__ = ["bits", "counts", "positive", "ranks", "strategies"]

_Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides of every cell, such as peft.rank=4")]
_Sets = Annotated[str, typer.Option(help="clinics, medquad, ..., comma-separated; all: those that are there")]
_Data = Annotated[
    Path | None, typer.Option(envvar="CLOISTER_DATA", callback=at_home, help="folder of public sets (docs/studies.md)")
]
_Epsilons = Annotated[str, typer.Option(help="privacy of each site, comma-separated; inf: none")]
_Partitions = Annotated[str, typer.Option(help="iid, dirichlet:ALPHA, own; comma-separated")]
_Sites = Annotated[str, typer.Option(help="numbers of sites, comma-separated")]
_Rounds = Annotated[int, typer.Option(min=1, help="rounds of each cell")]
_Steps = Annotated[int, typer.Option(min=1, help="local steps of a round")]
_Records = Annotated[float, typer.Option(min=1, help="expected records per step, over all sites")]
_Seeds = Annotated[str, typer.Option(help="comma-separated; each repeats the whole grid")]
_Rates = Annotated[str, typer.Option(help="factors on the learning rate to try; tables keep the best")]
_Out = Annotated[
    Path, typer.Option(callback=at_home, help="folder of the results; a study that was stopped goes on there")
]
_Workers = Annotated[int, typer.Option(min=1, help="cells at a time, each in its own process with one thread")]


def strategies(
    overrides: _Overrides = None,
    strategies: Annotated[str, typer.Option(help="comma-separated; all: every strategy")] = "all",
    sets: _Sets = "all",
    data: _Data = None,
    epsilons: _Epsilons = "inf,8,3,1",
    partitions: _Partitions = "iid,dirichlet:0.3",
    sites: _Sites = "8",
    rounds: _Rounds = 6,
    steps: _Steps = 4,
    records: _Records = 192,
    seeds: _Seeds = "0",
    rates: _Rates = "1",
    out: _Out = Path("runs/study-strategies"),
    workers: _Workers = 2,
) -> None:
    """Which strategy should I pick? Quality against bytes, with and without privacy.

    Few and many sites side by side: --sites 8,50, in twice the time.
    """
    from simulations.study_grids import strategies_cells, strategies_known

    grid = _grid(overrides, sets, data, epsilons, partitions, sites, rounds, steps, records, seeds, rates)
    chosen = strategies_known() if strategies == "all" else strategies.split(",")
    _run("strategies", strategies_cells(grid, chosen), out, workers)


def bits(
    overrides: _Overrides = None,
    codecs: Annotated[str, typer.Option(help="such as none,int8,eden:2,topk:0.05; all: each at several rates")] = "all",
    strategy: Annotated[str, typer.Option(help="the strategy of every cell")] = "ffa_lora",
    sets: _Sets = "clinics",
    data: _Data = None,
    epsilons: _Epsilons = "inf,3",
    partitions: _Partitions = "iid",
    sites: _Sites = "8",
    rounds: _Rounds = 6,
    steps: _Steps = 4,
    records: _Records = 192,
    seeds: _Seeds = "0",
    rates: _Rates = "1",
    out: _Out = Path("runs/study-bits"),
    workers: _Workers = 2,
) -> None:
    """How many bits do I need? Quality against the bits of an update, for each codec."""
    from simulations.study_grids import bits_cells, default_codecs

    grid = _grid(overrides, sets, data, epsilons, partitions, sites, rounds, steps, records, seeds, rates)
    chosen = default_codecs() if codecs == "all" else codecs.split(",")
    _run("bits", bits_cells(grid, strategy, chosen), out, workers)


def ranks(
    overrides: _Overrides = None,
    ranks: Annotated[
        str, typer.Option(help="ranks that sites take in turn, alternatives after a semicolon")
    ] = "8,8,8,8;8,2,8,2;2,2,2,2",
    strategies: Annotated[str, typer.Option(help="comma-separated")] = "ffa_lora,fedsvd,flora,flexlora,hetlora,ravan",
    sets: _Sets = "clinics",
    data: _Data = None,
    epsilons: _Epsilons = "inf,8",
    partitions: _Partitions = "own",
    sites: _Sites = "4",
    rounds: _Rounds = 6,
    steps: _Steps = 4,
    records: _Records = 192,
    seeds: _Seeds = "0",
    rates: _Rates = "1",
    out: _Out = Path("runs/study-ranks"),
    workers: _Workers = 2,
) -> None:
    """What do weak sites lose? Quality on each site's records, where ranks are mixed and where they are not."""
    from simulations.study_grids import ranks_cells

    grid = _grid(overrides, sets, data, epsilons, partitions, sites, rounds, steps, records, seeds, rates)
    _run("ranks", ranks_cells(grid, strategies.split(","), ranks.split(";")), out, workers)


def _grid(
    overrides: list[str] | None,
    sets: str,
    data: Path | None,
    epsilons: str,
    partitions: str,
    sites: str,
    rounds: int,
    steps: int,
    records: float,
    seeds: str,
    rates: str,
) -> Grid:
    from rich.console import Console

    from cli.quiet import quiet_libraries

    quiet_libraries()
    from simulations.study_grids import Grid
    from simulations.study_sets import chosen_sets

    chosen, missing = chosen_sets(sets, data)
    for reason in missing:
        Console(highlight=False).print(reason, soft_wrap=True)
    return Grid(
        sets=chosen,
        epsilons=positive("--epsilons", epsilons),
        partitions=partitions.split(","),
        sites=counts("--sites", sites, least=1),
        seeds=counts("--seeds", seeds, least=0),
        rounds=rounds,
        steps=steps,
        records=records,
        rate_factors=positive("--rates", rates),
        overrides=overrides or [],
    )


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{option}={text} holds something that is no number; write 1,3,8") from error


def positive(option: str, text: str) -> list[float]:
    """Return the numbers of an option, all above 0."""
    values = _numbers(option, text)
    if not all(each > 0 for each in values):
        raise typer.BadParameter(f"{option}={text} must be above 0; write 1,3,8")
    return values


def counts(option: str, text: str, *, least: int) -> list[int]:
    """Return the whole numbers of an option, all at least `least`."""
    counts = _numbers(option, text)
    if not all(each.is_integer() and each >= least for each in counts):
        raise typer.BadParameter(f"{option}={text} must be whole numbers of at least {least}; write 8,50")
    return [int(each) for each in counts]


def _run(study: str, cells: Sequence[Cell], out: Path, workers: int) -> None:
    """Run what is missing, with an estimate before and a bar meanwhile; then write the table and the picture."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cli.quiet import quiet_libraries
    from simulations.study_cells import expected_seconds, finished, run_cells
    from simulations.study_report import markdown_of, plot_lines, plot_sites, points_of

    console = Console(highlight=False)
    known, minutes = len(finished(cells, out)), expected_seconds(cells, out, workers) / 60
    console.print(f"{len(cells)} cells, {known} done before; about {minutes:.0f} minutes on {workers} idle cores")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(study, total=len(cells))

        def show(line: Line) -> None:
            progress.update(task, advance=1, description=line.labels.name)

        lines = run_cells(cells, out, show, workers=workers, prepare=quiet_libraries)
    points = points_of(lines)
    text, picture = out / "results.md", out / "results.png"
    text.write_text(markdown_of(points, study))
    if study == "ranks":
        plot_sites(points, picture)
    else:
        plot_lines(points, picture, against="bits" if study == "bits" else "megabytes")
    console.print(text.read_text(), markup=False, soft_wrap=True)
    for name, file in (("table", out / "results.csv"), ("picture", picture), ("text", text)):
        console.print(f"{name:<8} {file}", soft_wrap=True)
