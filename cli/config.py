"""`cloister config`: the composed experiment, its digest, and warnings."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.chosen import print_chosen

__all__ = ["config_command"]


def config_command(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as strategy=fedit")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the canonical JSON alone.")] = False,
) -> None:
    """Print the experiment that the overrides make up, its digest, and what is worth a second look."""
    from conf.compose import compose_experiment
    from conf.schema.rules import warnings_for

    experiment = compose_experiment(overrides or [])
    if as_json:
        typer.echo(experiment.canonical_json())
        return
    import yaml
    from rich.console import Console
    from rich.syntax import Syntax

    console = Console()
    text = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    print_chosen(overrides or [], console)
    console.print(f"digest {experiment.digest}", highlight=False)
    for warning in warnings_for(experiment):
        console.print(f"[yellow]warning[/yellow] {warning}", highlight=False)
