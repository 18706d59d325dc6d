"""The server's own ledger of a client-level run: booked before anything is sent, committed before it is used."""

from __future__ import annotations

from pathlib import Path

from conf.schema.privacy import ClientLevel
from privacy.client_level import ClientLevelPlan
from privacy.ledger import Budget, Ledger, Reservation
from privacy.mechanisms import SubsampledGaussian

__all__ = ["commit", "open_budget", "reserve"]


def open_budget(path: Path, privacy: ClientLevel, plan: ClientLevelPlan) -> Ledger:
    """Return the ledger of a run, whose budget is what the run promises: its target ε, or what its noise comes to."""
    epsilon = privacy.target_epsilon or plan.epsilon([plan.whole_run])
    return Ledger(path, Budget(epsilon, plan.delta))


def reserve(ledger: Ledger, run: str, round_number: int, mechanism: SubsampledGaussian) -> Reservation:
    """Book what a round will release; on disk when this returns.

    Raises:
        BudgetExceeded: with the figures; nothing is booked then.
    """
    return ledger.reserve(run, round_number, mechanism)


def commit(ledger: Ledger, reservation: Reservation) -> None:
    """Mark that the round was noised; called before the new adapter is used or stored."""
    ledger.commit(reservation)
