"""What a site keeps between rounds, in its own directory: the ledger, and diagnostics that never leave."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema.site import SiteFile
from privacy.identity import identify
from privacy.ledger import Budget, Ledger, load_or_create_keys

__all__ = ["SiteState"]


class SiteState:
    """The files of one site."""

    def __init__(self, site: SiteFile) -> None:
        self._folder = Path(site.state_directory)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._budget = None if site.budget is None else Budget(site.budget.epsilon, site.budget.delta)
        self.ledger: Ledger | None = None

    def open_ledger(self, units: Iterable[bytes]) -> Ledger | None:
        """Return the ledger of the data set with these units; None where the site has no budget."""
        if self.ledger is None and self._budget is not None:
            keys = load_or_create_keys(self._folder)
            self.ledger = Ledger(self._folder / "ledger.db", keys.signing, identify(units, keys.secret), self._budget)
        return self.ledger

    def record_diagnostics(self, round_number: int, diagnostics: Any, **private_facts: float) -> None:
        """Append a round's private facts to `diagnostics.jsonl`, for the site's own operator."""
        line = json.dumps({"round": round_number, **asdict(diagnostics), **private_facts})
        with (self._folder / "diagnostics.jsonl").open("a") as stream:
            stream.write(line + "\n")

    def close(self) -> None:
        """Release the ledger's file."""
        if self.ledger is not None:
            self.ledger.close()
