"""The root command, and how errors reach a person."""

from __future__ import annotations

import sys

import typer

from cli import config, data, doctor, ledger, plan, run, runs, server, simulate, site, study

__all__ = ["app", "main"]

app = typer.Typer(
    name="cloister",
    help="Private federated fine-tuning of language models on data that may not leave the building.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback with local variables would print records to the screen.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("simulate")(simulate.simulate_command)
app.command("plan")(plan.plan_command)
app.command("doctor")(doctor.doctor_command)
app.command("config")(config.config_command)
app.command("run")(run.run_command)
app.command("runs")(runs.runs_command)
app.command("logs")(runs.logs_command)
app.command("stop")(runs.stop_command)
app.add_typer(server.app, name="server")
app.add_typer(study.app, name="study")
app.add_typer(data.app, name="data")
app.add_typer(ledger.app, name="ledger")
app.add_typer(site.app, name="site")


def main() -> None:
    """Run the command line; errors made for people are shown without a traceback, with their own exit code."""
    try:
        app()
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        _show(str(error))
        sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    from conf.compose import InvalidConfiguration
    from protocol.errors import CloisterError, ConfigError

    if isinstance(error, InvalidConfiguration):
        return ConfigError.exit_code
    return error.exit_code if isinstance(error, CloisterError) else None


def _show(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False).print(Text.assemble(("error ", "bold red"), message), soft_wrap=True)
