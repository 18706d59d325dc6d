"""`cloister site`: a site's own process, its policy's decisions, and whether it is ready."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cli.paths import at_home, expanded_path

if TYPE_CHECKING:
    from client.approvals import Approvals

__all__ = ["app"]

app = typer.Typer(help="A site: its own process, what it agrees to, whether it is ready.", no_args_is_help=True)

ConfigOption = Annotated[Path, typer.Option("--config", callback=at_home, help="the site's own file (YAML)")]
SITE_YAML = Path("site.yaml")


@app.command()
def serve(config: ConfigOption = SITE_YAML) -> None:
    """Serve the site on its local socket until SIGTERM: data, ledger, model, policy and keys stay in this process."""
    import logging

    from client.site_file import read_site_file

    file = read_site_file(config)
    logging.basicConfig(level=file.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    from cli.quiet import quiet_libraries

    quiet_libraries()
    from client.serve import serve as serve_site

    serve_site(file)


@app.command()
def pending(config: ConfigOption = SITE_YAML, every: Annotated[bool, typer.Option("--all")] = False) -> None:
    """List the experiments that wait for this site's approval; --all shows decided ones too."""
    from rich.console import Console
    from rich.table import Table

    shown = [asked for asked in _approvals(config).all() if every or asked.state == "pending"]
    console = Console(highlight=False)
    if not shown:
        console.print("no experiment waits for approval")
        return
    table = Table(
        "digest",
        "state",
        "since",
        "run",
        "privacy",
        "clip",
        "noise",
        "strategy",
        "objective",
        "codec",
        "rounds x steps",
        "rank",
        box=None,
    )
    table.columns[0].no_wrap = True
    for asked in shown:
        table.add_row(asked.digest[:16], asked.state, asked.since, *_summary(asked.plan))
    console.print(table)
    console.print("the whole plan: approvals/DIGEST.json in state_directory; then: cloister site approve DIGEST")


@app.command()
def approve(
    digest: Annotated[str, typer.Argument(help="8 or more digits of the experiment's digest")],
    config: ConfigOption = SITE_YAML,
) -> None:
    """Agree to an experiment. The rest of the policy, and the budget, still hold."""
    typer.echo(f"approved {_approvals(config).decide(digest, 'approved').digest}")


@app.command()
def revoke(
    digest: Annotated[str, typer.Argument(help="8 or more digits of the experiment's digest")],
    config: ConfigOption = SITE_YAML,
) -> None:
    """Take an approval back, or say no to an experiment; it holds from the next round on."""
    typer.echo(f"revoked {_approvals(config).decide(digest, 'revoked').digest}")


def _approvals(config: Path) -> Approvals:
    from datetime import UTC, datetime

    from client.approvals import Approvals
    from client.site_file import read_site_file

    return Approvals(Path(read_site_file(config).state_directory) / "approvals", lambda: datetime.now(UTC))


def _summary(plan: dict[str, dict[str, object]]) -> tuple[str, ...]:
    """Return the cells that tell plans apart; rich's own markup in a server's text is not followed."""
    from rich.markup import escape

    if not plan:
        return ("approved before it was asked", *[""] * 8)
    privacy, local = plan["privacy"], plan["local"]
    price = privacy.get("target_epsilon") or privacy.get("noise_multiplier")
    name = "ε" if privacy.get("target_epsilon") else "σ"
    noise = privacy.get("noise", "-")  # the mechanism's name, or client-level noise with a kind of its own
    objective = cast("dict[str, object]", plan["strategy"]["objective"])
    cells = (
        plan["run"],
        f"{privacy['kind']} {name}={price}",
        privacy.get("clip_norm", "-"),
        cast("dict[str, object]", noise)["kind"] if isinstance(noise, dict) else noise,
        plan["strategy"]["kind"],
        objective["kind"],
        plan["quantization"]["kind"],
        f"{plan['rounds']} x {local['steps']}",
        plan["peft"]["rank"],
    )
    return tuple(escape(str(cell)) for cell in cells)


@app.command()
def start(config: ConfigOption = SITE_YAML) -> None:
    """Start this site's SuperNode, which runs no bundle that the site does not allow, until SIGTERM."""
    from client.node import prepare_node, run_node
    from client.site_file import read_site_file

    raise typer.Exit(run_node(prepare_node(read_site_file(config))))


@app.command("allow-bundle")
def allow_bundle_command(
    bundle: Annotated[
        str, typer.Argument(help="a SHA-256 digest, or a bundle's file (.fab); default: this release's")
    ] = "",
    config: ConfigOption = SITE_YAML,
) -> None:
    """Add a Flower bundle to the list of those that may run here, and print the list."""
    from client.bundles import BUNDLES_FILE, allow_bundle, bundle_digest, own_bundle_digest
    from client.site_file import read_site_file

    path, bundle = Path(read_site_file(config).state_directory) / BUNDLES_FILE, expanded_path(bundle)
    if not bundle:
        allow_bundle(path, own_bundle_digest(), "this release's own bundle")
    elif Path(bundle).is_file():
        allow_bundle(path, bundle_digest(Path(bundle).read_bytes()), Path(bundle).name)
    else:
        allow_bundle(path, bundle, "by hand")
    typer.echo(path.read_text(), nl=False)


@app.command()
def check(config: ConfigOption = SITE_YAML) -> None:
    """Try everything this site needs, from data to server; the exit code is 1 when something fails."""
    from datetime import UTC, datetime

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cli.quiet import quiet_libraries
    from client.site_file import read_site_file

    file = read_site_file(config)
    quiet_libraries()
    from client.check import check_site

    words = {True: "[green]pass[/green]", False: "[bold red]FAIL[/bold red]", None: "[dim]n/a[/dim]"}
    table = Table("", "check", box=None)
    table.add_column("found", overflow="fold")
    table.add_column("if it fails", overflow="fold")
    outcomes = list(check_site(file, datetime.now(UTC)))
    for outcome in outcomes:
        fix = escape(outcome.fix) if outcome.passed is False else ""
        table.add_row(words[outcome.passed], outcome.name, escape(outcome.detail), fix)
    Console(highlight=False).print(table)
    raise typer.Exit(int(any(outcome.passed is False for outcome in outcomes)))


@app.command()
def init(
    config: ConfigOption = SITE_YAML,
    name: Annotated[str | None, typer.Option(help="of this site; public")] = None,
    data: Annotated[str | None, typer.Option(help="the file or folder of records")] = None,
    columns: Annotated[str | None, typer.Option(help="text, instruction, chat, prompt_completion, labelled")] = None,
    published_records: Annotated[int | None, typer.Option(help="a rounded-up count that may be public", min=1)] = None,
    model: Annotated[str | None, typer.Option(help="folder of the base model")] = None,
    epsilon: Annotated[float | None, typer.Option(help="the budget of each record, over all runs")] = None,
    delta: Annotated[float | None, typer.Option(help="default: 1 / (10 x published records)")] = None,
    expires: Annotated[str | None, typer.Option(help="YYYY-MM-DD; default: in a year")] = None,
    state: Annotated[str | None, typer.Option(help="folder of keys, ledger and replies")] = None,
    superlink: Annotated[str | None, typer.Option(help="the server, HOST:PORT")] = None,
    root_certificates: Annotated[str | None, typer.Option(help="PEM file of the server's CA")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="ask nothing; take defaults for what is not given")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace the file")] = False,
) -> None:
    """Write a commented site file, asking for what is not given."""
    from datetime import UTC, date, datetime, timedelta

    from cli.site_init import Answers, site_yaml
    from client.site_file import read_site_file
    from protocol.errors import ConfigError

    if config.exists() and not force:
        raise ConfigError(f"{config} exists; write another with --config, or replace it with --force")

    def asked(question: str, given: str | None, default: str) -> str:
        return given if given is not None else default if yes else str(typer.prompt(question, default=default))

    records = int(asked("published record count (public, rounded up)", _text(published_records), "1000"))
    in_a_year = (datetime.now(UTC) + timedelta(days=365)).date().isoformat()
    answers = Answers(
        name=asked("name of this site (public)", name, "site"),
        data=_absolute(asked("records", data, "records.jsonl")),
        columns=asked("kind of records", columns, "prompt_completion"),
        published_records=records,
        model=(path := asked("folder of the base model", model, "embedded:clinic-base")),
        base_digest=_digest_of(path),
        epsilon=float(asked("budget ε of each record, over all runs", _text(epsilon), "8")),
        delta=float(asked("δ", _text(delta), f"{0.1 / records:.3g}")),
        expires=date.fromisoformat(asked("last day of the budget", expires, in_a_year)),
        state=_absolute(asked("folder of keys and ledger", state, "state")),
        superlink=asked("server, HOST:PORT (empty: none yet)", superlink, "") or None,
        root_certificates=_absolute(asked("PEM file of the server's CA (empty: the system's)", root_certificates, ""))
        or None,
    )
    config.write_text(site_yaml(answers), encoding="utf-8")
    read_site_file(config)
    typer.echo(f"{config} is written; read it, then: cloister site check --config {config}")


def _absolute(path: str) -> str:
    """Return a path that holds wherever the site is started from; no path, and embedded:clinics, stay."""
    return path if not path or ":" in path else str(Path(expanded_path(path)).absolute())


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _digest_of(model: str) -> str | None:
    """Return the base's digest to pin; None when it is not installed yet."""
    from conf.schema.model import Model
    from finetuning.models import base_digest
    from protocol.errors import ModelError

    try:
        return base_digest(Model(path=model))
    except ModelError:
        return None
