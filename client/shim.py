"""What stands in front of Flower's `flwr-clientapp`: a bundle that this site does not allow is never unpacked.

Flower starts `flwr-clientapp` for each message, found on PATH; `client.node` puts this in its place. The bundle's bytes
are hashed before Flower installs them, so nothing of an unlisted bundle is written, imported or run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from client.bundles import allowed_bundles, bundle_digest

__all__ = ["checked", "main"]


def checked(install: Callable[..., object], allowed: Path) -> Callable[..., object]:
    """Return Flower's installer with the check in front; the list is read anew each time."""

    def install_allowed(content: bytes, *arguments: object, **options: object) -> object:
        digest = bundle_digest(content)
        if digest not in allowed_bundles(allowed):
            raise PermissionError(f"bundle {digest[:12]} is not on this site's list")
        return install(content, *arguments, **options)

    return install_allowed


def main(allowed: str) -> None:
    """Run `flwr-clientapp`, with the bundles listed in `allowed`."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    sys.argv[0] = "flwr-clientapp"
    run_clientapp.install_from_fab = checked(run_clientapp.install_from_fab, Path(allowed))  # type: ignore[assignment]
    flwr_clientapp()
