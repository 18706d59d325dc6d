"""What a site keeps between rounds, in its own directory: the ledger, and diagnostics that never leave."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema.site import SiteFile
from privacy.ledger import Budget, Ledger

__all__ = ["SiteState"]


class SiteState:
    """The files of one site."""

    def __init__(self, site: SiteFile) -> None:
        self._folder = Path(site.state_directory)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.ledger = (
            None
            if site.budget is None
            else Ledger(self._folder / "ledger.db", Budget(site.budget.epsilon, site.budget.delta))
        )

    def record_diagnostics(self, round_number: int, diagnostics: Any, **private_facts: float) -> None:
        """Append a round's private facts to `diagnostics.jsonl`, for the site's own operator."""
        line = json.dumps({"round": round_number, **asdict(diagnostics), **private_facts})
        with (self._folder / "diagnostics.jsonl").open("a") as stream:
            stream.write(line + "\n")

    def close(self) -> None:
        """Release the ledger's file."""
        if self.ledger is not None:
            self.ledger.close()
