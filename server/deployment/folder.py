"""The folder of one server, and its settings.

::

    server.yaml            names and ports (conf/schema/server.py)
    tls/                   ca.crt ca.key server.crt server.key
    secrets/superexec      what a SuperExec must know to be given work
    state/superlink.db     the SuperLink's nodes, runs and messages
    flower/                Flower's own home: the connection used by `cloister run`
    bundle/cloister/       what sites are sent, one file
    proxy/ systemd/ docker/    rendered, to be installed
    for_sites/             what every site is given
    runs/ submitted/       run directories, and which Flower run is which
    server/                what else the ServerApp keeps between runs
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from conf.plain_yaml import problems_of, read_yaml
from conf.schema.server import ServerFile
from protocol.errors import ConfigError

__all__ = ["ServerFolder", "find_folder", "new_folder", "read_settings", "write_new"]

_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")


@dataclass(frozen=True)
class ServerFolder:
    """Where everything of one server is."""

    path: Path

    @property
    def settings(self) -> Path:
        """Names and ports."""
        return self.path / "server.yaml"

    @property
    def ca_certificate(self) -> Path:
        """What every site trusts."""
        return self.path / "tls" / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """Signs server certificates; belongs offline."""
        return self.path / "tls" / "ca.key"

    @property
    def certificate(self) -> Path:
        """Of the proxy and of the SuperLink."""
        return self.path / "tls" / "server.crt"

    @property
    def key(self) -> Path:
        """The key of `certificate`."""
        return self.path / "tls" / "server.key"

    @property
    def secret(self) -> Path:
        """Shared by SuperLink and SuperExec."""
        return self.path / "secrets" / "superexec"

    @property
    def database(self) -> Path:
        """The SuperLink's."""
        return self.path / "state" / "superlink.db"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME of every process of this server."""
        return self.path / "flower"

    @property
    def bundle(self) -> Path:
        """The project that `flwr run` packs; Flower wants the folder named like the project."""
        return self.path / "bundle" / "cloister"

    @property
    def runs(self) -> Path:
        """Run directories."""
        return self.path / "runs"

    @property
    def kept(self) -> Path:
        """What the ServerApp keeps between runs, besides them."""
        return self.path / "server"

    @property
    def submitted(self) -> Path:
        """One file per submitted run."""
        return self.path / "submitted"

    @property
    def proxy(self) -> Path:
        """nginx' and Caddy's configuration."""
        return self.path / "proxy"

    @property
    def systemd(self) -> Path:
        """The units."""
        return self.path / "systemd"

    @property
    def docker(self) -> Path:
        """Dockerfile and compose file."""
        return self.path / "docker"

    @property
    def for_sites(self) -> Path:
        """What every site is given."""
        return self.path / "for_sites"


def find_folder(given: Path | None, environment: dict[str, str] | None = None) -> ServerFolder:
    """Return the server's folder: the given one, `$CLOISTER_SERVER`, or the current one.

    Raises:
        ConfigError: it holds no server.yaml.
    """
    environment = dict(os.environ) if environment is None else environment
    path = (given or Path(environment.get("CLOISTER_SERVER") or ".")).expanduser().resolve()
    folder = ServerFolder(path)
    if not folder.settings.is_file():
        raise ConfigError(
            f"{path} is no server's folder: it has no server.yaml; name one (or set CLOISTER_SERVER), or make one "
            "with: cloister server init DIR"
        )
    return folder


def read_settings(folder: ServerFolder) -> ServerFile:
    """Return what `server.yaml` says.

    Raises:
        ConfigError: it is no YAML, or invalid; every problem is named.
    """
    try:
        return ServerFile.model_validate(read_yaml(folder.settings.read_text()))
    except (yaml.YAMLError, OSError) as error:
        raise ConfigError(f"{folder.settings} cannot be read: {error}") from error
    except ValidationError as error:
        lines = [f"  - {problem}" for problem in problems_of(error)]
        raise ConfigError(f"{folder.settings} has {len(lines)} problem(s):\n" + "\n".join(lines)) from error


def new_folder(path: Path) -> ServerFolder:
    """Return a folder that may be filled.

    Raises:
        ConfigError: it is in use, or its name cannot stand in every file that names it.
    """
    path = path.expanduser().resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not empty; keys are never overwritten: choose another folder")
    if not _PLAIN.fullmatch(str(path)):
        raise ConfigError(
            f"{str(path)!r} has characters that systemd and nginx read in another sense; use letters, digits, . _ - /"
        )
    return ServerFolder(path)


def write_new(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file that does not exist yet, with exactly this mode from its first byte on.

    Raises:
        ConfigError: it exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists; it is not overwritten: move it away first") from error
    with os.fdopen(handle, "wb") as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(content)
