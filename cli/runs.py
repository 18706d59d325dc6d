"""`cloister runs`, `cloister logs` and `cloister stop`: what a federation's server is doing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.server import ServerOption

if TYPE_CHECKING:
    from server.deployment.flower import Flower
    from server.deployment.folder import ServerFolder

__all__ = ["logs_command", "runs_command", "stop_command"]

_DETAILS = 5
"""How many runs' ends are explained, the latest."""

Run = Annotated[str, typer.Argument(metavar="RUN", help="a run's name, the start of it, its number, or: last")]


def runs_command(server: ServerOption = None) -> None:
    """List the runs of a server: number, status, name, rounds."""
    from rich.console import Console
    from rich.table import Table

    from server.deployment.submission import read_submissions

    folder, flower = _connection(server)
    submissions = read_submissions(folder)
    table = Table(title=f"runs of {folder.path}", title_justify="left")
    for heading in ("run", "status", "name", "rounds", "minutes", "number"):
        table.add_column(heading, justify="right" if heading in ("rounds", "minutes") else "left", overflow="fold")
    details: list[str] = []
    for item in flower.runs():
        made = submissions.get(item.run_id)
        rounds = "–" if made is None else f"{_rounds_done(folder.runs / made.run)} of {made.rounds}"
        name, run = ("–", "–") if made is None else (made.name, made.run)
        table.add_row(run, item.status, name, rounds, f"{item.elapsed / 60:.1f}", item.run_id)
        if item.details:
            details.append(f"{run if made else item.run_id}: {item.details}")
    console = Console(highlight=False)
    console.print(table)
    for line in details[-_DETAILS:]:
        console.print(line, soft_wrap=True, markup=False)


def logs_command(
    run: Run = "last",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until the run ends")] = False,
    server: ServerOption = None,
) -> None:
    """Print a run's log, as its ServerApp writes it."""
    from server.deployment.submission import find_submission

    folder, flower = _connection(server)
    flower.log(find_submission(folder, run), follow=follow)


def stop_command(run: Run, server: ServerOption = None) -> None:
    """Stop a run. What sites have booked stays booked."""
    from rich.console import Console

    from server.deployment.submission import find_submission

    folder, flower = _connection(server)
    number = find_submission(folder, run)
    flower.stop(number)
    Console(highlight=False).print(f"stopped  {run} ({number}); a site that is training ends its round and is not used")


def _connection(server: Path | None) -> tuple[ServerFolder, Flower]:
    from server.deployment.flower import Flower
    from server.deployment.folder import find_folder, read_settings
    from server.deployment.programs import Programs

    folder = find_folder(server)
    return folder, Flower(Programs(folder, read_settings(folder).admin_port))


def _rounds_done(directory: Path) -> int:
    """Return how many rounds a run directory records; 0 where there is none yet."""
    try:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    finished = [json.loads(line) for line in lines if '"round_finished"' in line and line.endswith("}")]
    return max((int(event["round"]) for event in finished), default=0)
