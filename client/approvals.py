"""Which experiments somebody at this site has agreed to: a folder of plans, waiting, approved or revoked.

`DIGEST.json` holds the plan as the server asked for it, and what was decided. The digest is of the plan, computed here,
so what is approved is exactly what was read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from protocol.errors import ConfigError, SiteRefusal

__all__ = ["Approvals", "Asked", "State"]

State = Literal["pending", "approved", "revoked"]
_MAX_PENDING = 100
"""A server that invents plans must not fill the disk, nor keep later plans out: the oldest ones go."""


@dataclass(frozen=True)
class Asked:
    """An experiment that some server wanted of this site."""

    digest: str
    state: State
    since: str
    plan: dict[str, Any]
    """Empty where the digest was approved before any server asked."""


class Approvals:
    """The folder `approvals` of a site's state directory."""

    def __init__(self, folder: Path, clock: Callable[[], datetime]) -> None:
        self._folder, self._clock = folder, clock

    def check(self, digest: str, plan: dict[str, Any]) -> None:
        """Return when an experiment is approved; note it for the site's people otherwise.

        Raises:
            SiteRefusal: code `not_approved`.
        """
        everything = self.all()
        known = {asked.digest: asked.state for asked in everything}
        if known.get(digest) == "approved":
            return
        if digest not in known:
            pending = [asked.digest for asked in everything if asked.state == "pending"]
            for old in pending[: max(0, len(pending) + 1 - _MAX_PENDING)]:
                (self._folder / f"{old}.json").unlink(missing_ok=True)
            self._write(digest, "pending", plan)
        raise SiteRefusal("not_approved", f"experiment {digest[:12]} is not approved; see: cloister site pending")

    def all(self) -> tuple[Asked, ...]:
        """Return every experiment known here, the latest last.

        Raises:
            ConfigError: a file is damaged; what it approved must be decided again.
        """
        files = [path for path in self._folder.glob("*.json") if re.fullmatch(r"[0-9a-f]{64}", path.stem)]
        found = [self._read(path) for path in files]
        return tuple(sorted(found, key=lambda asked: asked.since))

    def decide(self, prefix: str, state: Literal["approved", "revoked"]) -> Asked:
        """Approve or revoke the experiment whose digest starts with `prefix` (8 digits or more), and return it.

        Raises:
            ConfigError: no experiment or several start with it. A whole digest may be decided before it is asked for.
        """
        if not re.fullmatch(r"[0-9a-f]{8,64}", prefix):
            raise ConfigError(f"{prefix!r} is no digest; give 8 to 64 of its hex digits (cloister site pending)")
        matching = [asked for asked in self.all() if asked.digest.startswith(prefix)]
        if len(matching) > 1 or (not matching and len(prefix) < 64):
            raise ConfigError(f"{len(matching)} experiments start with {prefix}; see: cloister site pending")
        if matching:
            return self._write(matching[0].digest, state, matching[0].plan)
        return self._write(prefix, state, {})

    @staticmethod
    def _read(path: Path) -> Asked:
        try:
            content = json.loads(path.read_text())
            state, since, plan = content["state"], content["since"], content["plan"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{path} is damaged ({error}); delete it, and decide about its experiment again"
            ) from error
        return Asked(path.stem, state, since, plan)

    def _write(self, digest: str, state: State, plan: dict[str, Any]) -> Asked:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        since = self._clock().isoformat(timespec="seconds")
        partial = self._folder / f".{digest}.partial"
        partial.write_text(json.dumps({"state": state, "since": since, "plan": plan}, indent=1))
        partial.replace(self._folder / f"{digest}.json")
        return Asked(digest, state, since, plan)
