"""The server's own ledger of a client-level run: booked before anything is sent, committed before it is used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from conf.schema.privacy import ClientLevel
from privacy.client_level import ClientLevelPlan
from privacy.identity import identify
from privacy.ledger import Booking, Budget, Ledger, Reservation, load_or_create_keys
from privacy.mechanisms import SubsampledGaussian
from privacy.randomness import inputs_digest

__all__ = ["RunBudget", "open_budget"]


@dataclass(frozen=True)
class RunBudget:
    """What one run may cost each of its sites, and what it has."""

    ledger: Ledger
    run: str
    plan_digest: str
    schedule: SubsampledGaussian

    def reserve(self, round_number: int, mechanism: SubsampledGaussian) -> Reservation:
        """Book what a round will release; on disk when this returns.

        Raises:
            BudgetExceeded: with the figures; nothing is booked then.
        """
        inputs = inputs_digest(self.run, self.plan_digest, str(round_number))
        return self.ledger.reserve(
            Booking(self.run, round_number, self.plan_digest, self.schedule, mechanism, inputs), fresh=True
        )

    def commit(self, reservation: Reservation, released: str) -> None:
        """Mark that the round was noised, with the digest of what it released; called before that is used or stored."""
        self.ledger.commit(reservation, released)


def open_budget(
    folder: Path, privacy: ClientLevel, plan: ClientLevelPlan, sites: Iterable[str], run: str, plan_digest: str
) -> RunBudget:
    """Return the budget of a run, which is what the run promises: its target ε, or what its noise comes to."""
    epsilon = privacy.target_epsilon or plan.epsilon([plan.whole_run])
    keys = load_or_create_keys(folder / "server_keys")
    data = identify((site.encode() for site in sites), keys.secret)
    ledger = Ledger(folder / "server_ledger.db", keys.signing, data, Budget(epsilon, plan.delta, "site"))
    return RunBudget(ledger, run, plan_digest, plan.whole_run)
