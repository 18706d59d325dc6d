"""`cloister simulate`: a federation on one machine, once or as a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.chosen import print_chosen
from cli.paths import at_home

if TYPE_CHECKING:
    from rich.console import Console

    from conf.schema.experiment import Experiment
    from simulations.books import SharedBooks
    from simulations.simulate import Simulated

__all__ = ["simulate_command"]

RUNS = Path("runs")


def simulate_command(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as strategy=fedit")] = None,
    multirun: Annotated[
        bool, typer.Option("-m", "--multirun", help="Run every combination of comma-separated values.")
    ] = False,
    repeat: Annotated[
        Path | None,
        typer.Option("--from", callback=at_home, help="Repeat the experiment of this run directory.", metavar="RUN"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", callback=at_home, help="Go on with this interrupted run directory.", metavar="RUN"),
    ] = None,
) -> None:
    """Simulate a federation on this machine; with no argument, four synthetic clinics train privately at ε = 8."""
    from rich.console import Console

    from conf.compose import split_sweep

    console = Console(highlight=False)
    if resume is not None:
        if multirun or repeat is not None or overrides:
            from protocol.errors import ConfigError

            raise ConfigError("--resume goes on with one run as it was; leave out -m, --from and the overrides")
        _print_outcome(_run(_stored(resume, []), console, RUNS, resume=resume), console)
        return
    if repeat is not None:
        if multirun:
            from protocol.errors import ConfigError

            raise ConfigError("--from repeats one run as it was; leave out -m")
        _run_once(_stored(repeat, overrides or []), console)
        return
    if not multirun:
        print_chosen(overrides or [], console)
        _run_once(_composed(overrides or []), console)
        return
    _run_sweep(split_sweep(overrides or []), console)


def _run_once(experiment: Experiment, console: Console) -> None:
    _print_outcome(_run(experiment, console, RUNS), console)


def _print_outcome(run: Simulated, console: Console) -> None:
    from cli.tables import figure_line, outcome_table, record_lines
    from server.summary import WHAT_TO_CHANGE, no_better_than

    console.print(outcome_table(run.summary))
    if run.summary["stopped"]:
        console.print(f"[yellow]ended early[/yellow]  {run.summary['stopped']}", soft_wrap=True)
    if (what := no_better_than(run.summary["final"])) is not None:
        title, text = WHAT_TO_CHANGE[what]
        console.print(f"[bold red]{title}[/bold red]  {text}", soft_wrap=True)
    if figures := figure_line(run.summary):
        console.print(f"held out {figures}", soft_wrap=True)
    for line in record_lines(run.summary):
        console.print(line, soft_wrap=True)
    console.print(f"adapter  {run.path / 'adapter'}\nreport   {run.path / 'report.html'}", soft_wrap=True)


def _run_sweep(jobs: list[tuple[str, ...]], console: Console) -> None:
    import json
    from datetime import datetime

    from cli.tables import delta_text, epsilon_text, sweep_table

    experiments = [_composed(job) for job in jobs]  # every job is valid before the first one starts
    parent = RUNS / f"{datetime.now():%Y%m%d-%H%M%S}-sweep"
    from simulations.books import shared_books

    books = shared_books(experiments, parent)
    finished: list[tuple[tuple[str, ...], Simulated]] = []
    for number, (job, experiment) in enumerate(zip(jobs, experiments, strict=True)):
        console.rule(f"{number + 1} of {len(jobs)}: {' '.join(job)}")
        own = experiment.logging.model_copy(update={"directory": str(parent / f"{number:03d}")})
        finished.append((job, _run(experiment.model_copy(update={"logging": own}), console, parent, books=books)))
    console.print(sweep_table([(job, run.summary) for job, run in finished]))
    for cost in books.costs:
        console.print(
            f"{cost.runs} private runs on the same records cost each {cost.unit} ε ≤ {epsilon_text(cost.epsilon)} "
            f"(δ ≤ {delta_text(cost.delta)}) together, whichever is kept; a Poisson number of them, mean {cost.runs}, "
            f"of which only the best were told, would cost {epsilon_text(cost.epsilon_of_best)}",
            soft_wrap=True,
        )
    told = {"privacy": books.told(), "runs": [{"overrides": job, "run": run.path.name} for job, run in finished]}
    (parent / "sweep.json").write_text(json.dumps(told, indent=1, ensure_ascii=False))
    console.print(f"runs     {parent}", soft_wrap=True)


def _run(
    experiment: Experiment,
    console: Console,
    parent: Path,
    *,
    books: SharedBooks | None = None,
    resume: Path | None = None,
) -> Simulated:
    from datetime import datetime

    from cli.progress import progress_for
    from cli.quiet import quiet_libraries
    from conf.schema.rules import warnings_for
    from server.app import new_run_path
    from server.run_directory import refuse_existing

    path = resume or new_run_path(experiment, parent, datetime.now())
    if resume is None:
        refuse_existing(path)
    for warning in warnings_for(experiment):
        console.print(f"[yellow]warning[/yellow] {warning}", soft_wrap=True)
    quiet_libraries()
    from simulations.simulate import simulate

    with progress_for(experiment, console) as observe:
        return simulate(experiment, path, (observe,), books=books, resume=resume is not None)


def _composed(overrides: list[str] | tuple[str, ...]) -> Experiment:
    from conf.compose import compose_experiment

    return compose_experiment(overrides)


def _stored(run: Path, overrides: list[str]) -> Experiment:
    """Return the experiment of a run directory, to be run into a new one."""
    from conf.compose import parse_experiment
    from protocol.errors import ConfigError

    if overrides:
        raise ConfigError(f"--from repeats a run as it was; leave out the overrides ({' '.join(overrides)})")
    config = run / "config.json"
    if not config.is_file():
        raise ConfigError(f"{run} is no run directory: it has no config.json")
    experiment = parse_experiment(config.read_bytes())
    logging = experiment.logging.model_copy(update={"directory": None})
    return experiment.model_copy(update={"logging": logging})
