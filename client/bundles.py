"""Which of Flower's application bundles may run at this site: a list of SHA-256 digests, and this release's own bundle.

A bundle of Cloister holds no code (docs/decisions/0002-empty-bundle.md), so its digest changes with a release and not
with an experiment: a site allows a handful of them.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from protocol.bundle import bundle_text
from protocol.errors import ConfigError

__all__ = ["BUNDLES_FILE", "allow_bundle", "allowed_bundles", "bundle_digest", "own_bundle_digest"]

BUNDLES_FILE = "allowed_bundles"
_DIGEST = re.compile(r"[0-9a-f]{64}")


def bundle_digest(content: bytes) -> str:
    """Return the SHA-256 (hex) of a bundle."""
    return hashlib.sha256(content).hexdigest()


def own_bundle_digest() -> str:
    """Return the digest of the bundle that `cloister run` of this release sends."""
    from flwr.cli.build import build_fab_from_disk

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cloister"  # Flower wants the folder to bear the project's name
        folder.mkdir()
        (folder / "pyproject.toml").write_text(bundle_text())
        return bundle_digest(build_fab_from_disk(folder))


def allowed_bundles(path: Path) -> frozenset[str]:
    """Return the digests in a list: the first word of each line. No list, or an empty one, allows nothing."""
    if not path.is_file():
        return frozenset()
    words = (line.split(maxsplit=1) for line in path.read_text().splitlines())
    return frozenset(first[0] for first in words if first and _DIGEST.fullmatch(first[0]))


def allow_bundle(path: Path, digest: str, note: str) -> None:
    """Add a digest to a list. One that root makes belongs to the owner of its folder, who adds to it later.

    Raises:
        ConfigError: it is no SHA-256 digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise ConfigError(f"{digest!r} is no SHA-256 digest; give 64 hex digits, or the bundle's file (.fab)")
    if digest in allowed_bundles(path):
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a") as stream:
        if os.geteuid() == 0 and stream.tell() == 0:
            owner = path.parent.stat()
            os.fchown(stream.fileno(), owner.st_uid, owner.st_gid)
        stream.write(f"{digest}  {' '.join(note.split())}\n")
