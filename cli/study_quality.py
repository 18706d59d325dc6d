"""`cloister study quality`: what a user gets who sets nothing, against what is possible."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.paths import at_home

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.study_cells import Cell, Line
    from simulations.study_quality import QualitySet

__all__ = ["quality"]


def quality(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides of every cell")] = None,
    sets: Annotated[
        str, typer.Option(help="clinics, banking77, ..., comma-separated; all: those that are there")
    ] = "all",
    data: Annotated[
        Path | None,
        typer.Option(envvar="CLOISTER_DATA", callback=at_home, help="folder of public sets (docs/studies.md)"),
    ] = None,
    encoder: Annotated[
        Path | None, typer.Option(callback=at_home, help="folder of a sentence encoder, for sets with classes")
    ] = None,
    places: Annotated[
        str, typer.Option(help="PARTITION:SITES, comma-separated, such as iid:8")
    ] = "dirichlet:0.5:6,dirichlet:0.5:50",
    epsilons: Annotated[str, typer.Option(help="privacy of each site, comma-separated; inf: none")] = "inf,8,3,1",
    seeds: Annotated[str, typer.Option(help="comma-separated; each repeats the whole grid")] = "0,1,2",
    out: Annotated[
        Path, typer.Option(callback=at_home, help="folder of the results; a study that was stopped goes on there")
    ] = Path("runs/study-quality"),
    workers: Annotated[int, typer.Option(min=1, help="cells at a time, each in its own process with one thread")] = 2,
) -> None:
    """How close do the chosen settings come to what is possible? Each set by its defaults, at several ε."""
    from rich.console import Console

    from cli.quiet import quiet_libraries
    from cli.study_grids import counts, positive

    quiet_libraries()
    from simulations.study_quality import quality_cells

    console = Console(highlight=False)
    chosen = _chosen(sets, data, encoder, console)
    cells = quality_cells(
        chosen,
        data,
        encoder,
        places.split(","),
        positive("--epsilons", epsilons),
        counts("--seeds", seeds, least=0),
        overrides or [],
    )
    lines = _run(cells, out, workers, console)
    _report(cells, lines, out, console)


def _chosen(names: str, data: Path | None, encoder: Path | None, console: Console) -> list[QualitySet]:
    from protocol.errors import ConfigError
    from simulations.study_quality import EMBEDDED, SETS

    known = {EMBEDDED.name: EMBEDDED, **SETS}
    wanted = list(known) if names == "all" else names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"data set {unknown[0]!r} does not exist; choose among {', '.join(known)}, or all")
    found: list[QualitySet] = []
    for each in (known[name] for name in wanted):
        if each is not EMBEDDED and (data is None or not (data / each.name / "normalized.jsonl").is_file()):
            console.print(f"{each.name} is left out: it is not in a folder of data (--data or CLOISTER_DATA)")
        elif each.classes and encoder is None:
            console.print(f"{each.name} is left out: it has classes, and no sentence encoder is given (--encoder)")
        else:
            found.append(each)
    if not found:
        raise ConfigError("no data set of the study is there; give --data and --encoder, or --sets clinics")
    return found


def _run(cells: list[Cell], out: Path, workers: int, console: Console) -> list[Line]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cli.quiet import quiet_libraries
    from simulations.study_cells import run_cells

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("quality", total=len(cells))

        def show(line: Line) -> None:
            progress.update(task, advance=1, description=line.labels.name)

        return run_cells(cells, out, show, workers=workers, prepare=quiet_libraries)


def _report(cells: list[Cell], lines: list[Line], out: Path, console: Console) -> None:
    from simulations.study_quality import markdown_of, plot, probe_accuracy, standings

    probes: dict[str, float] = {}
    for cell in cells:
        if cell.experiment is not None and cell.experiment.task.labels and cell.labels.data not in probes:
            accuracy = probe_accuracy(cell.experiment)
            if accuracy is not None:
                probes[cell.labels.data] = accuracy
    found = standings(lines, probes)
    (out / "results.md").write_text(markdown_of(found))
    console.print(markdown_of(found), markup=False, soft_wrap=True)
    for line in lines:
        if line.refused:
            console.print(f"refused  {line.labels.name}: {line.refused}", markup=False, soft_wrap=True)
    picture = plot(found, out / "results.png")
    for name, file in (("table", out / "results.csv"), ("text", out / "results.md"), ("picture", picture)):
        console.print(f"{name:<8} {file}", soft_wrap=True)
