"""Paths that a person gives: `~` is the home directory, wherever the path is written."""

import os
from typing import Annotated

from pydantic import AfterValidator

__all__ = ["LocalPath", "expanded"]


def expanded(path: str) -> str:
    """Return a path with a leading `~` or `~user` replaced by that home directory.

    No shell sees a path in a file, or behind the equals sign of an option. An unknown user's `~name` stays: a file may
    be called so. `HOME` says where home is, as for a shell.

    Raises:
        ValueError: the path begins with `~`, and this user has no home directory.
    """
    found = os.path.expanduser(path)
    if found == "~" or found.startswith("~/"):
        raise ValueError(f"{path!r} begins with ~, and HOME names no home directory; write the whole path")
    return found


LocalPath = Annotated[str, AfterValidator(expanded)]
"""A path on this machine, expanded where it is read. For what never leaves it: elsewhere `~` is another directory."""
