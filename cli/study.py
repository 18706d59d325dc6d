"""`cloister study`: comparisons that need several runs."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.paths import at_home, expanded_path
from cli.study_grids import bits, ranks, strategies
from cli.study_quality import quality

if TYPE_CHECKING:
    from simulations.study_robustness import Result

__all__ = ["app"]

app = typer.Typer(help="Comparisons that need several runs.", no_args_is_help=True)
for command in (quality, strategies, bits, ranks):
    app.command()(command)


@app.command()
def baselines(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as strategy=fedit")] = None,
) -> None:
    """Compare base, each site alone, federated and centralized training on the same held-out records."""
    from contextlib import ExitStack

    from rich.console import Console

    from cli.progress import progress_for
    from cli.quiet import quiet_libraries
    from cli.tables import baseline_table
    from conf.compose import compose_experiment

    console = Console(highlight=False)
    experiment = compose_experiment(overrides or [])
    quiet_libraries()
    import json
    from dataclasses import asdict

    from simulations.studies import Member, run_baselines

    given = experiment.logging.directory
    path = Path(expanded_path(given)) if given else Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-baselines"
    with ExitStack() as displays:

        def observers_of(member: Member):
            displays.close()
            console.rule(member.label)
            return (displays.enter_context(progress_for(member.experiment, console)),)

        lines = run_baselines(experiment, path, observers_of)
    (path / "baselines.json").write_text(json.dumps([asdict(line) for line in lines], indent=1, ensure_ascii=False))
    console.print(baseline_table(lines))
    console.print(f"runs     {path}", soft_wrap=True)


@app.command()
def robustness(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides of the study's experiment")] = None,
    rules: Annotated[str, typer.Option(help="comma-separated; default: seven; all: every rule")] = "default",
    attacks: Annotated[str, typer.Option(help="comma-separated; default: five; all: every attack")] = "default",
    fractions: Annotated[str, typer.Option(help="shares of attackers, comma-separated")] = "0.2",
    out: Annotated[Path, typer.Option(callback=at_home, help="results; a study that was stopped goes on there")] = Path(
        "runs/robustness"
    ),
    workers: Annotated[int, typer.Option(min=1, help="cells at a time, each in its own process")] = 2,
) -> None:
    """Try robust rules against attacking sites: quality and backdoor success of each pair."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cli.quiet import quiet_libraries
    from cli.tables import robustness_table

    console = Console(highlight=False)
    quiet_libraries()
    from simulations.attacks import ATTACKS
    from simulations.study_robustness import (
        DEFAULT_ATTACKS,
        DEFAULT_RULES,
        RULES,
        cells_of,
        plot_results,
        run_robustness,
        study_experiment,
    )

    experiment = study_experiment(overrides or [])
    cells = list(
        cells_of(
            _named(rules, DEFAULT_RULES, RULES),
            _named(attacks, DEFAULT_ATTACKS, ATTACKS),
            _shares(fractions),
        )
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("robustness", total=len(cells))

        def show(result: Result) -> None:
            progress.update(task, advance=1, description=result.cell.name)

        results = run_robustness(experiment, cells, out, show, workers=workers, prepare=quiet_libraries)
    console.print(robustness_table(results))
    console.print(f"table    {out / 'results.csv'}", soft_wrap=True)
    console.print(f"picture  {plot_results(results, out / 'results.png')}", soft_wrap=True)


def _named(text: str, usual: Iterable[str], known: Iterable[str]) -> list[str]:
    return list({"default": usual, "all": known}.get(text, text.split(",")))


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--fractions={text} holds something that is no number; write 0.1,0.2") from error
