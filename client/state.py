"""What a site keeps between rounds, in its own directory: keys, ledger, and diagnostics that never leave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from client.memory import SiteMemory
from client.site_file import ledger_location
from client.units import Units
from conf.schema.site import SiteFile
from privacy.identity import identify
from privacy.ledger import (
    HEAD_FILE,
    SITE_LEDGER_FILE,
    Budget,
    Ledger,
    SigningKey,
    SiteKeys,
    head_file,
    load_or_create_keys,
    open_private,
)
from protocol.errors import SiteRefusal

__all__ = ["SiteState"]

_REFERENCED_RUNS = 16
"""Some runs cost a site nothing (without privacy, or without a `site_budget`), so a server can name any number."""


class SiteState:
    """The files of one site."""

    def __init__(self, site: SiteFile) -> None:
        self._site = site
        self._folder = Path(site.state_directory)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._ledger: tuple[Units, Ledger] | None = None
        self._site_ledger: Ledger | None = None

    @cached_property
    def _keys(self) -> SiteKeys:
        return load_or_create_keys(self._folder)

    @property
    def secret(self) -> bytes:
        """The key of this site's noise and of the hashes of its records; never leaves the site."""
        return self._keys.secret

    @property
    def signing_key(self) -> SigningKey:
        """The key of this site's ledgers and card."""
        return self._keys.signing

    def ledger(self, units: Units) -> Ledger:
        """Return the ledger of the data set that consists of `units`.

        Raises:
            SiteRefusal: this site has no budget.
        """
        if self._ledger is not None and self._ledger[0] is units:
            return self._ledger[1]
        budget = self._site.budget
        if budget is None:
            raise SiteRefusal(
                "no_budget", "this site has no privacy budget; its operator must set one in the site file"
            )
        self._close_ledger()
        where = ledger_location(self._site)
        identity = identify((*units.names, *units.spellings), self.secret, units.marks)
        promised = Budget(budget.epsilon, budget.delta, budget.unit)
        ledger = Ledger(where, self._keys.signing, identity, promised, head_file=self._folder / HEAD_FILE)
        self._ledger = (units, ledger)
        return ledger

    def site_ledger(self) -> Ledger | None:
        """Return the ledger in which this whole site is one unit; None without a `site_budget`."""
        budget = self._site.site_budget
        if budget is not None and self._site_ledger is None:
            identity = identify([b"the whole site"], self.secret)
            promised = Budget(budget.epsilon, budget.delta, "site")
            where = self._folder / SITE_LEDGER_FILE
            head = head_file(self._folder, where)
            self._site_ledger = Ledger(where, self._keys.signing, identity, promised, head_file=head)
        return self._site_ledger

    def memory(self, run: str) -> SiteMemory:
        """Return what the strategy keeps from round to round of a run."""
        return SiteMemory(self._folder, run)

    def left_out(self, run: str) -> SiteMemory:
        """Return what the codec left out of a run's updates."""
        return SiteMemory(self._folder, run, "left_out")

    def references(self, run: str) -> SiteMemory:
        """Return the adapters received in a run, which a server may send changes of; without them it sends all."""
        return SiteMemory(self._folder, run, "references", most_runs=_REFERENCED_RUNS)

    def spent(self) -> float:
        """Return the ε of everything booked for the data set of the last round; 0 before the first."""
        return 0.0 if self._ledger is None else self._ledger[1].spent()

    def record_diagnostics(self, round_number: int, private_facts: Mapping[str, float]) -> None:
        """Append a round's private facts to `diagnostics.jsonl`, for the site's own operator."""
        with open_private(self._folder / "diagnostics.jsonl", "a") as stream:
            stream.write(json.dumps({"round": round_number, **private_facts}) + "\n")

    def close(self) -> None:
        """Release the ledgers' files."""
        if self._site_ledger is not None:
            self._site_ledger.close()
            self._site_ledger = None
        self._close_ledger()

    def _close_ledger(self) -> None:
        if self._ledger is not None:
            self._ledger[1].close()
            self._ledger = None
