"""The bundle that this server's runs send: one file without code, the same for every run of a release."""

from __future__ import annotations

import hashlib
from pathlib import Path

from protocol.bundle import bundle_text
from server.deployment.folder import write_new

__all__ = ["bundle_digest", "refresh_bundle", "write_bundle"]


def write_bundle(folder: Path) -> None:
    """Write the project that `flwr run` packs.

    Raises:
        ConfigError: it exists.
    """
    write_new(folder / "pyproject.toml", bundle_text().encode())


def refresh_bundle(folder: Path) -> None:
    """Make the project that of the installed release, with nothing else in it that could be packed."""
    for extra in folder.rglob("*"):
        if extra.is_file() and extra.name != "pyproject.toml":
            extra.unlink()
    (folder / "pyproject.toml").write_text(bundle_text())


def bundle_digest(folder: Path) -> str:
    """Return the SHA-256 of the bundle, packed by Flower's own function."""
    from flwr.cli.build import build_fab_from_disk

    return hashlib.sha256(build_fab_from_disk(folder)).hexdigest()
