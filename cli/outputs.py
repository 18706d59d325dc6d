"""Files that a command writes: refused before the work, where they cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["FIGURES", "check_output"]

FIGURES = (".png", ".svg", ".pdf")
"""What a figure can be written as."""


def check_output(path: Path, suffixes: tuple[str, ...] = (), option: str = "the output") -> None:
    """Refuse a file that cannot be written, before the work is done.

    Raises:
        ConfigError: naming `option`, and what to do.
    """
    from protocol.errors import ConfigError

    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} {path} ends in {path.suffix or 'nothing'!r}; use one of {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path} is in a folder that does not exist; run: mkdir -p {path.parent}")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be written; name another place")
