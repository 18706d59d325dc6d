"""`cloister study`: comparisons that need several runs."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from cli.study_grids import bits, ranks, strategies

__all__ = ["app"]

app = typer.Typer(help="Comparisons that need several runs.", no_args_is_help=True)
for command in (strategies, bits, ranks):
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
    path = Path(given) if given else Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-baselines"
    with ExitStack() as displays:

        def observers_of(member: Member):
            displays.close()
            console.rule(member.label)
            return (displays.enter_context(progress_for(member.experiment, console)),)

        lines = run_baselines(experiment, path, observers_of)
    (path / "baselines.json").write_text(json.dumps([asdict(line) for line in lines], indent=1, ensure_ascii=False))
    console.print(baseline_table(lines))
    console.print(f"runs     {path}", soft_wrap=True)
