"""`cloister server`: certificates and files of a federation's server, starting it, and proving that it is closed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.paths import at_home

if TYPE_CHECKING:
    from rich.console import Console

    from conf.schema.server import ServerFile

__all__ = ["ServerOption", "app"]

app = typer.Typer(help="Set up, start and check a federation's server.", no_args_is_help=True)

Folder = Annotated[
    Path | None,
    typer.Argument(metavar="DIR", callback=at_home, help="the server's folder; default $CLOISTER_SERVER, or ."),
]
ServerOption = Annotated[
    Path | None,
    typer.Option(
        "--server", metavar="DIR", callback=at_home, help="the server's folder; default $CLOISTER_SERVER, or ."
    ),
]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="DIR", callback=at_home, help="a new folder")],
    san: Annotated[
        list[str] | None, typer.Option("--san", help="host name or address by which sites reach it; may be repeated")
    ] = None,
    name: Annotated[str | None, typer.Option(help="names the systemd units")] = None,
    public_port: Annotated[int | None, typer.Option(help="port for sites, on the proxy")] = None,
    admin_port: Annotated[int | None, typer.Option(help="port of the SuperLink, on loopback")] = None,
    listen: Annotated[str | None, typer.Option(help="address on which the proxy listens")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing")] = False,
) -> None:
    """Make certificates, secret, bundle, and the files for systemd, Docker, nginx and Caddy; overwrite nothing."""
    from datetime import UTC, datetime

    from rich.console import Console

    from server.deployment.files import make_server, next_steps
    from server.deployment.folder import new_folder

    folder = new_folder(path)
    hosts = tuple(san or ()) or _asked_hosts(ask=not yes)
    if not yes:
        public_port = public_port or typer.prompt("Port for sites", default=443, type=int)
        admin_port = admin_port or typer.prompt("Port of the SuperLink, on loopback", default=8000, type=int)
    given = {
        "name": name,
        "hosts": hosts,
        "public_address": listen,
        "public_port": public_port,
        "admin_port": admin_port,
    }
    server = _validated({key: value for key, value in given.items() if value is not None})
    make_server(folder, server, datetime.now(UTC))
    console = Console(highlight=False)
    console.print(f"server   {folder.path}", soft_wrap=True)
    _print_digests(console, folder.for_sites / "connection.txt")
    console.print("next")
    for number, step in enumerate(next_steps(folder, server), start=1):
        console.print(f" {number}. {step}", soft_wrap=True, markup=False)


@app.command()
def start(path: Folder = None) -> None:
    """Run SuperLink and SuperExec in the foreground, and start again whichever ends."""
    from rich.console import Console

    from server.deployment.folder import find_folder, read_settings
    from server.deployment.launch import supervise
    from server.deployment.programs import Programs

    folder = find_folder(path)
    server = read_settings(folder)
    programs = Programs(folder, server.admin_port)
    console = Console(highlight=False)
    console.print(f"proxy    {' '.join(programs.nginx[:-1])} '{programs.nginx[-1]}'", soft_wrap=True, markup=False)
    supervise(programs, lambda line: console.print(line, soft_wrap=True, markup=False))


@app.command()
def check(path: Folder = None) -> None:
    """Prove certificates, keys, ports, database, and that only what sites need passes the proxy; fail with fixes."""
    from datetime import UTC, datetime

    from rich.console import Console
    from rich.table import Table

    from server.deployment.checks import check_files
    from server.deployment.folder import find_folder, read_settings
    from server.deployment.reachability import check_reachability

    folder = find_folder(path)
    server = read_settings(folder)
    table = Table(title=f"server {folder.path}", title_justify="left")
    for heading in ("", "check", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    styles = {"ok": "green", "warning": "yellow", "failed": "bold red"}
    checks = [*check_files(folder, server, datetime.now(UTC)), *check_reachability(folder, server)]
    from rich.text import Text

    for item in checks:
        fix = "" if item.state == "ok" else item.fix
        table.add_row(Text(item.state, style=styles[item.state]), item.name, Text(item.found), Text(fix))
    Console(highlight=False).print(table)
    if any(item.state == "failed" for item in checks):
        sys.exit(1)


@app.command()
def register(
    public_key: Annotated[
        Path, typer.Argument(metavar="SITE.pub", callback=at_home, help="the public half of a site's node key")
    ],
    server: ServerOption = None,
) -> None:
    """Let a site's SuperNode in; its private key never leaves the site."""
    from rich.console import Console

    from server.deployment.flower import Flower
    from server.deployment.folder import find_folder, read_settings
    from server.deployment.node_keys import read_node_key
    from server.deployment.programs import Programs

    folder = find_folder(server)
    key = read_node_key(public_key)
    number = Flower(Programs(folder, read_settings(folder).admin_port)).register(public_key)
    console = Console(highlight=False)
    console.print(f"node     {number}")
    console.print(f"key      {key}: compare it with the site's operator (ssh-keygen -lf SITE.pub)", soft_wrap=True)


@app.command()
def renew(path: Folder = None) -> None:
    """Make a new certificate for the same server key and for the hosts of server.yaml; needs the authority's key."""
    from datetime import UTC, datetime

    from rich.console import Console

    from server.deployment.certificates import read_served, renew_server_certificate
    from server.deployment.folder import find_folder, read_settings

    folder = find_folder(path)
    renew_server_certificate(folder, read_settings(folder).hosts, datetime.now(UTC))
    served = read_served(folder)
    until = served.certificate.not_valid_after_utc
    Console(highlight=False).print(
        f"valid    until {until:%Y-%m-%d} for {', '.join(served.hosts)}; restart SuperLink and proxy", soft_wrap=True
    )


def _asked_hosts(*, ask: bool) -> tuple[str, ...]:
    from protocol.errors import ConfigError

    if not ask:
        raise ConfigError("under which name do sites reach this server? add --san federation.example.org")
    import socket

    given = typer.prompt("Host names and addresses by which sites reach this server", default=socket.getfqdn())
    return tuple(given.replace(",", " ").split())


def _validated(values: dict[str, object]) -> ServerFile:
    from pydantic import ValidationError

    from conf.schema.server import ServerFile
    from protocol.errors import ConfigError

    try:
        return ServerFile.model_validate(values)
    except ValidationError as error:
        lines = [f"  - {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError("a server like this cannot be made:\n" + "\n".join(lines)) from error


def _print_digests(console: Console, connection: Path) -> None:
    console.print(f"\n{connection.read_text().strip()}\n", soft_wrap=True, markup=False)
