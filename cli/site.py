"""`cloister site`: a site's own process, its policy's decisions, and whether it is ready."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from client.approvals import Approvals

__all__ = ["app"]

app = typer.Typer(help="A site: its own process, what it agrees to, whether it is ready.", no_args_is_help=True)

ConfigOption = Annotated[Path, typer.Option("--config", help="the site's own file (YAML)")]
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
    table = Table("digest", "state", "since", "run", "privacy", "strategy", "rounds x steps", "rank", box=None)
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
        return ("approved before it was asked", "", "", "", "")
    privacy, local = plan["privacy"], plan["local"]
    price = privacy.get("target_epsilon") or privacy.get("noise_multiplier")
    name = "ε" if privacy.get("target_epsilon") else "σ"
    cells = (
        plan["run"],
        f"{privacy['kind']} {name}={price}",
        plan["strategy"]["kind"],
        f"{plan['rounds']} x {local['steps']}",
        plan["peft"]["rank"],
    )
    return tuple(escape(str(cell)) for cell in cells)
