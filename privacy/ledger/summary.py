"""What a ledger says, in the order in which a person asks: how much may be spent, how much is, by whom, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from privacy.identity import overlapping
from privacy.ledger.admission import Charge, Stated, charges_of, rule_for, schedules_of, state
from privacy.ledger.budget import Budget, stored_budget
from privacy.ledger.chain import GENESIS, Entry
from privacy.ledger.store import Snapshot
from privacy.plan import relation_of

__all__ = ["DataSetSpending", "LedgerSummary", "RunSpending", "SpendingPoint", "summarize"]


@dataclass(frozen=True)
class RunSpending:
    """What one run booked on one data set."""

    run: str
    reservations: int
    uncommitted: int
    """Reserved and never committed: a crash, or a round in progress. Counted as spent."""
    steps: int
    epsilon: float
    """Of this run alone."""


@dataclass(frozen=True)
class SpendingPoint:
    """The ε of a data set after one reservation, as it was stated then."""

    sequence: int
    at: str
    epsilon: float
    budget: float


@dataclass(frozen=True)
class DataSetSpending:
    """Everything that concerns one data set, with what was booked on data sets that share units with it.

    An auditor reads it, so the number of units, which no ε covers, is no part of it.
    """

    fingerprint: str
    shares_units_with: tuple[str, ...]
    spent: Stated
    left: float
    """Budget minus ε; what a further run may take is decided by the filter, not by this difference."""
    runs: tuple[RunSpending, ...]
    points: tuple[SpendingPoint, ...]


@dataclass(frozen=True)
class LedgerSummary:
    """A whole ledger."""

    budget: Budget | None
    relation: str | None
    """Which two data sets the budget makes hard to tell apart."""
    entries: int
    head: str
    data_sets: tuple[DataSetSpending, ...]


def summarize(snapshot: Snapshot) -> LedgerSummary:
    """Return the summary of a ledger; whether the ledger holds is not looked at, see `verify`."""
    entries = snapshot.entries
    budget, concerned = stored_budget(entries), overlapping(snapshot.data_sets)
    return LedgerSummary(
        budget=budget,
        relation=None if budget is None else relation_of(budget.unit),
        entries=len(entries),
        head=entries[-1].hash if entries else GENESIS,
        data_sets=()
        if budget is None
        else tuple(
            _data_set(snapshot, fingerprint, concerned[fingerprint], budget)
            for fingerprint in _in_order_of_use(entries)
        ),
    )


def _in_order_of_use(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.fingerprint for entry in entries if entry.kind == "reserve"))


def _data_set(snapshot: Snapshot, fingerprint: str, shared: frozenset[str], budget: Budget) -> DataSetSpending:
    entries = snapshot.entries
    charges = charges_of(entries, shared)
    spent = _stated(charges, shared, budget, entries)
    committed = frozenset(entry.content["reserve"] for entry in entries if entry.kind == "commit")
    return DataSetSpending(
        fingerprint=fingerprint,
        shares_units_with=tuple(sorted(shared - {fingerprint})),
        spent=spent,
        left=max(0.0, budget.epsilon - spent.epsilon),
        runs=tuple(
            _run(run, [charge for charge in charges if charge.run == run], shared, budget, entries, committed)
            for run in dict.fromkeys(charge.run for charge in charges)
        ),
        points=_points(entries, fingerprint),
    )


def _run(
    run: str,
    charges: Sequence[Charge],
    shared: frozenset[str],
    budget: Budget,
    entries: Sequence[Entry],
    committed: frozenset[int],
) -> RunSpending:
    return RunSpending(
        run=run,
        reservations=len(charges),
        uncommitted=sum(charge.sequence not in committed for charge in charges),
        steps=sum(charge.mechanism.steps for charge in charges),
        epsilon=_stated(charges, shared, budget, entries).epsilon,
    )


def _stated(charges: Sequence[Charge], shared: frozenset[str], budget: Budget, entries: Sequence[Entry]) -> Stated:
    schedules = schedules_of(entries, shared, charges[-1].run)
    return state(rule_for(charges, schedules), charges, budget, entries)


def _points(entries: Sequence[Entry], fingerprint: str) -> tuple[SpendingPoint, ...]:
    return tuple(
        SpendingPoint(entry.sequence, entry.at, entry.content["epsilon_after"], entry.content["budget"]["epsilon"])
        for entry in entries
        if entry.kind == "reserve" and entry.fingerprint == fingerprint
    )
