"""`cloister run`: submit an experiment to a federation's server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.chosen import print_chosen
from cli.server import ServerOption

if TYPE_CHECKING:
    from conf.schema.experiment import Experiment
    from server.deployment.folder import ServerFolder

__all__ = ["run_command"]


def run_command(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as strategy=fedit")] = None,
    server: ServerOption = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="go on with an interrupted run, by its name")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="show the log until the run ends")] = False,
) -> None:
    """Compose and validate an experiment, and start it on the server; sites decide by their own policies."""
    from datetime import UTC, datetime

    from rich.console import Console

    from conf.compose import compose_experiment
    from conf.schema.rules import warnings_for
    from server.deployment.bundle import bundle_digest
    from server.deployment.flower import Flower
    from server.deployment.folder import find_folder, read_settings
    from server.deployment.programs import Programs
    from server.deployment.submission import submit

    folder = find_folder(server)
    experiment = compose_experiment(overrides or []) if resume is None else _stored(folder, resume, overrides)
    console = Console(highlight=False)
    if resume is None:
        print_chosen(overrides or [], console)
    for warning in warnings_for(experiment):
        console.print(f"[yellow]warning[/yellow] {warning}", soft_wrap=True)
    flower = Flower(Programs(folder, read_settings(folder).admin_port))
    made = submit(folder, flower, experiment, datetime.now(UTC), resume or "")
    console.print(f"run      {made.run}\nnumber   {made.flower_run}\ndigest   {made.digest}", soft_wrap=True)
    console.print(f"bundle   {bundle_digest(folder.bundle)}", soft_wrap=True)
    console.print(f"folder   {folder.runs / made.run}", soft_wrap=True)
    if follow:
        flower.log(made.flower_run, follow=True)
    else:
        console.print(f"watch    cloister logs {made.run} --follow --server {folder.path}", soft_wrap=True)


def _stored(folder: ServerFolder, run: str, overrides: list[str] | None) -> Experiment:
    """Return the experiment of an interrupted run."""
    from conf.compose import parse_experiment
    from protocol.errors import ConfigError

    if overrides:
        raise ConfigError(f"--resume goes on with a run as it was; leave out the overrides ({' '.join(overrides)})")
    config = folder.runs / run / "config.json"
    if not config.is_file():
        known = ", ".join(sorted(each.parent.name for each in folder.runs.glob("*/config.json"))[-5:]) or "none"
        raise ConfigError(f"there is no run {run!r} to resume in {folder.runs}; the newest there: {known}")
    return parse_experiment(config.read_bytes())
