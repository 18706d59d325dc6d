"""The server's own ledger of client-level runs: booked before anything is sent, committed before it is used.

It outlives runs. What several runs cost one site is the sum of them, so a server keeps one ledger for all of its runs:
every run that shares an enrolled site with this one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.schema.federation import ServerBudget
from privacy.client_level import ClientLevelPlan
from privacy.identity import identify
from privacy.ledger import HEAD_FILE, Booking, Budget, Ledger, Reservation, load_or_create_keys
from privacy.ledger.budget import stored_budget
from privacy.ledger.journal import Journal
from privacy.mechanisms import SubsampledGaussian
from privacy.randomness import inputs_digest
from protocol.errors import PrivacyError

__all__ = ["RunBudget", "ServerBooks", "agreed_delta"]

_LEDGER = "ledger.db"


@dataclass(frozen=True)
class RunBudget:
    """What client-level runs may cost each site, and what this run has of it."""

    ledger: Ledger
    run: str
    plan_digest: str
    schedule: SubsampledGaussian
    inputs: str
    """Digest of everything that decides how a round is released, but for the updates."""
    secret: bytes
    """The key of the server's noise and of its secret cohorts."""

    def reserve(self, round_number: int, mechanism: SubsampledGaussian, *, fresh: bool = False) -> Reservation:
        """Book what a round will release; on disk when this returns.

        A round that was booked before is the same reservation again, and costs nothing: its noise is derived from the
        server's key, so it gives the same bits, and `commit` refuses others.

        Raises:
            BudgetExceeded: with the figures; nothing is booked then.
            PrivacyError: no step is booked for a round of a mechanism that was not paid for under the same inputs.
        """
        inputs = inputs_digest(self.inputs, str(round_number))
        if not mechanism.steps and not self._is_paid(mechanism):
            raise PrivacyError(
                f"round {round_number} of run {self.run} belongs to correlated noise that is not booked: round 1 had "
                "other sites, weights or settings; restore them, or start a new run"
            )
        return self.ledger.reserve(
            Booking(self.run, round_number, self.plan_digest, self.schedule, mechanism, inputs), fresh=fresh
        )

    def _is_paid(self, mechanism: SubsampledGaussian) -> bool:
        first = (1, inputs_digest(self.inputs, "1"), self.schedule)
        booked = ((each.round, each.inputs_digest, each.mechanism) for each in self.ledger.charges(self.run))
        return mechanism == self.schedule.repeated(0) and first in booked

    def commit(self, reservation: Reservation, released: str) -> None:
        """Mark that the round was noised, with the digest of what it released; called before that is used or stored.

        Raises:
            ReplayDiverged: this round released something else before.
        """
        self.ledger.commit(reservation, released)


@dataclass(frozen=True)
class ServerBooks:
    """Where the server's ledger is, and what it may hold."""

    folder: Path
    budget: ServerBudget | None = None
    """None: what the ledger says, and where it is new, what its first run promises."""

    def standing_budget(self) -> Budget | None:
        """Return the budget that holds for the next run; None before the first run, if none is configured.

        Raises:
            PrivacyError: the configured δ is not the ledger's.
        """
        asked = None if self.budget is None else Budget(self.budget.epsilon, self.budget.delta, "site")
        if not (self.folder / _LEDGER).exists():
            return asked
        journal = Journal(self.folder / _LEDGER, load_or_create_keys(self.folder).signing)
        try:
            with journal.reading() as (_, entries):
                stored = stored_budget(entries)
        finally:
            journal.close()
        if stored is not None and asked is not None and stored.delta != asked.delta:
            raise PrivacyError(
                f"federation.server_budget is at δ={asked.delta:.3g}, the ledger in {self.folder} at δ="
                f"{stored.delta:.3g}; give the ledger's, or change it with cloister ledger set-budget"
            )
        return asked or stored

    def open(
        self, epsilon: float, plan: ClientLevelPlan, sites: Sequence[str], run: str, plan_digest: str
    ) -> RunBudget:
        """Return the budget of a run; in a new ledger without a configured budget, `epsilon` at the plan's δ."""
        keys = load_or_create_keys(self.folder)
        data = identify((site.encode() for site in sites), keys.secret)
        budget = self.standing_budget() or Budget(epsilon, plan.delta, "site")
        ledger = Ledger(self.folder / _LEDGER, keys.signing, data, budget, head_file=self.folder / HEAD_FILE)
        inputs = inputs_digest(run, plan_digest, repr(plan), *sorted(sites))
        return RunBudget(ledger, run, plan_digest, plan.whole_run, inputs, keys.secret)


def agreed_delta(asked: float | None, standing: Budget | None) -> float | None:
    """Return the one δ of a run and its ledger: the ledger's, where it has one.

    Raises:
        PrivacyError: the run asks for a smaller δ than the ledger's.
    """
    if standing is None:
        return asked
    if asked is not None and asked < standing.delta:
        raise PrivacyError(
            f"privacy.delta={asked:.3g} is below the δ={standing.delta:.3g} at which the server's ledger keeps its "
            f"budget; ask for {standing.delta:.3g} or more, or null"
        )
    return standing.delta
