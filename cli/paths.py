"""Paths on the command line. A shell expands `~` at the start of a word, and not behind the `=` of an option."""

from __future__ import annotations

from pathlib import Path

__all__ = ["at_home", "expanded_path"]


def expanded_path(path: str) -> str:
    """Return a path with `~` expanded.

    Raises:
        ConfigError: there is no home directory.
    """
    from conf.schema.paths import expanded
    from protocol.errors import ConfigError

    try:
        return expanded(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def at_home(path: Path | None) -> Path | None:
    """Expand `~` in an option or argument: the `callback` of each that is a path."""
    return None if path is None else Path(expanded_path(str(path)))
