"""Reading a site's own file, and where its parts are on disk. Imports nothing that is slow to import."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import yaml
from pydantic import ValidationError

from conf.plain_yaml import problems_of, read_yaml
from conf.schema.site import SiteFile, SiteNode
from protocol.errors import ConfigError

__all__ = ["account_of", "ledger_location", "read_site_file", "socket_path"]


def read_site_file(path: Path) -> SiteFile:
    """Return a site file, read from YAML.

    Raises:
        ConfigError: missing, or invalid; every problem is named.
    """
    if not path.is_file():
        raise ConfigError(f"site file {path} does not exist; a site without its own file allows nothing")
    try:
        return SiteFile.model_validate(read_yaml(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"site file {path} is no YAML: {error}") from error
    except ValidationError as error:
        lines = [f"  - {problem}" for problem in problems_of(error)]
        raise ConfigError(f"site file {path} has {len(lines)} problem(s):\n" + "\n".join(lines)) from error


def socket_path(file: SiteFile) -> Path:
    """Return where the site's process listens."""
    return Path(file.serve.socket or Path(file.state_directory) / "run" / "site.sock").absolute()


def ledger_location(file: SiteFile) -> str | Path:
    """Return the path or URL of the site's ledger."""
    return file.ledger or Path(file.state_directory) / "ledger.db"


def account_of(node: SiteNode | None) -> pwd.struct_passwd | None:
    """Return the other user that the SuperNode runs as; None when it is this process's own.

    Raises:
        ConfigError: no such user.
    """
    if node is None or node.user is None:
        return None
    try:
        account = pwd.getpwnam(node.user)
    except KeyError as error:
        raise ConfigError(
            f"node.user={node.user!r} is no user of this machine; create it, or drop node.user"
        ) from error
    return None if account.pw_uid == os.getuid() else account
