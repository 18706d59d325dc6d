"""`cloister run`: submit an experiment to a federation's server."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.server import ServerOption

__all__ = ["run_command"]


def run_command(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as strategy=fedit")] = None,
    server: ServerOption = None,
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
    experiment = compose_experiment(overrides or [])
    console = Console(highlight=False)
    for warning in warnings_for(experiment):
        console.print(f"[yellow]warning[/yellow] {warning}", soft_wrap=True)
    flower = Flower(Programs(folder, read_settings(folder).admin_port))
    made = submit(folder, flower, experiment, datetime.now(UTC))
    console.print(f"run      {made.run}\nnumber   {made.flower_run}\ndigest   {made.digest}", soft_wrap=True)
    console.print(f"bundle   {bundle_digest(folder.bundle)}", soft_wrap=True)
    console.print(f"folder   {folder.runs / made.run}", soft_wrap=True)
    if follow:
        flower.log(made.flower_run, follow=True)
    else:
        console.print(f"watch    cloister logs {made.run} --follow --server {folder.path}", soft_wrap=True)
