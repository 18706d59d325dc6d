"""`cloister doctor`: proof, on real steps, that what is promised is what is executed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conf.schema.experiment import Experiment
    from privacy.doctor.subject import Verdict

__all__ = ["doctor_command"]

_WORDS = {True: "[green]pass[/green]", False: "[bold red]FAIL[/bold red]", None: "[dim]n/a [/dim]"}


def doctor_command(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as strategy=fedit")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON alone.")] = False,
) -> None:
    """Run real steps on throw-away copies of the first site and prove, check by check, that the promise is kept.

    Spends no budget: ledgers and adapters live in a temporary folder. Exit code 0 when nothing fails, else the code of
    the first check that does:

    10 adapters move; 11 base stays; 12 per-example gradients equal the loop; 13 one unit moves the sum by at most the
    clip norm; 14 release is scaled by a public constant; 15 noise has the calibrated deviation; 16 noise is Gaussian
    and fresh; 17 sampler is Poisson at the booked rate; 18 booked is what was executed; 19 an empty batch is a step;
    20 stated ε is the price of all rounds; 21 δ is for the whole run; 22 no metric leaves unprotected; 23 updates are
    clipped as a whole; 24 randomness follows from the site's secret alone; 25 noise does not depend on the sum; 26
    released values lie on the lattice, and use all of it; 27 the released loss is bounded and noised; 28 other
    accountants agree; 29 repeatable noise is refused.

    A check that rests on statistics fails a healthy program at most once in a million runs. What no check can see is in
    docs/threat_model.md.
    """
    from conf.compose import compose_experiment

    experiment = compose_experiment(overrides or [])
    verdicts = _examined(experiment)
    from privacy.doctor.diagnosis import exit_code

    if as_json:
        _print_json(experiment, verdicts)
    else:
        _print_lines(experiment, verdicts)
    raise typer.Exit(exit_code(verdicts.items()))


def _examined(experiment: Experiment) -> dict[int, Verdict]:
    from tempfile import TemporaryDirectory

    from cli.quiet import quiet_libraries

    quiet_libraries()
    from pathlib import Path

    from privacy.doctor.diagnosis import diagnose
    from simulations.doctor import observe_site
    from simulations.population import build_population

    with TemporaryDirectory(prefix="cloister-doctor-") as scratch:
        return diagnose(observe_site(experiment, build_population(experiment).parts, Path(scratch)))


def _print_lines(experiment: Experiment, verdicts: Mapping[int, Verdict]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    for verdict in verdicts.values():
        console.print(f"{_WORDS[verdict.passed]} {verdict.name}: [dim]{escape(verdict.evidence)}[/dim]", soft_wrap=True)
    failed = sum(verdict.passed is False for verdict in verdicts.values())
    applied = sum(verdict.passed is not None for verdict in verdicts.values())
    console.print(f"\n{applied - failed} of {applied} checks passed for privacy={experiment.privacy.kind}")
    if experiment.privacy.kind == "client_level":
        console.print("not examined: the noise on the sum of updates, and its price, are the server's")


def _print_json(experiment: Experiment, verdicts: Mapping[int, Verdict]) -> None:
    import json
    from dataclasses import asdict

    from privacy.doctor.diagnosis import exit_code

    lines = [{"code": code, **asdict(verdict)} for code, verdict in verdicts.items()]
    told = {"experiment": experiment.digest, "exit_code": exit_code(verdicts.items()), "checks": lines}
    typer.echo(json.dumps(told, indent=1, ensure_ascii=False))
