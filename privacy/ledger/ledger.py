"""A site's ledger: asked before every round, told before anything leaves.

`reserve` writes an entry *before* its steps are executed; when it returns, the entry is on disk. `commit` writes
another when they were, before anything leaves. A crash in between counts as spent.

**Replay.** A site derives its noise from its secret, from the digest of every input, and from the number of the
attempt. So the same inputs again give the same bits, which tell nobody anything new and cost nothing. That this is so
is not assumed: `commit` compares the digest of the output with the one that was committed before.

**Whose entries count.** A unit is in a data set if its keyed hash is. The entries of every data set that shares at
least one unit with this one count. That is an upper bound for each unit: whatever touched unit u was booked on a data
set that contains u, and every such data set shares u with this one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from privacy.identity import DataIdentity
from privacy.ledger.admission import RULES, Charge, Stated, charges_of, rule_for, schedules_of, state
from privacy.ledger.budget import FROM_SITE_FILE, Budget, budget_content, effective_budget, stored_budget
from privacy.ledger.chain import Entry
from privacy.ledger.journal import Clock, Journal, Pen
from privacy.ledger.keys import SigningKey
from privacy.ledger.store import Transaction
from privacy.mechanisms import SubsampledGaussian, gathered
from protocol.errors import BudgetExceeded, PrivacyError, ReplayDiverged

__all__ = ["Account", "Booking", "Ledger", "Reservation"]

_log = logging.getLogger(__name__)

_TOLERANCE = 1e-9
"""Relative; a noise multiplier calibrated to the budget must not fail by the last bit of a float."""


@dataclass(frozen=True)
class Booking:
    """What a site is about to execute."""

    run: str
    round: int
    plan_digest: str
    schedule: SubsampledGaussian
    """The whole run, as declared before its first round."""
    mechanism: SubsampledGaussian
    """This round."""
    inputs_digest: str
    """Of everything that the output depends on: adapter, records in order, configuration."""


@dataclass(frozen=True)
class Reservation:
    """Steps that are booked and may now be executed; `epsilon_after` counts them."""

    entry: int
    """The sequence number of the reservation."""
    epsilon_after: float
    attempt: int
    """From 1. Together with the inputs it makes the noise key: no two different executions share one."""
    replayed: bool
    """Whether this was booked before, and so costs nothing now."""
    output_digest: str | None
    """What was committed for this attempt before; None if nothing was."""


@dataclass(frozen=True)
class Account:
    """What a site may say in public of its spending.

    It counts every data set of the ledger, whether or not a unit is shared: an upper bound for each unit, and no answer
    to the question which records lie in which data set.
    """

    run: Stated
    """Of one run."""
    total: Stated
    """Of all runs."""
    budget: Budget
    admitted: float
    """The largest ε under which anything was booked: no unit has spent more, also after the budget was lowered.
    Infinite where something was booked at a larger δ than today's."""
    steps: int
    """Booked by the run."""
    mechanisms: tuple[SubsampledGaussian, ...]
    """Booked by the run: public constants, one for each set of parameters, with its steps."""


class Ledger:
    """The spending of one data set, in a ledger that may hold others."""

    def __init__(
        self,
        location: str | Path,
        key: SigningKey,
        data: DataIdentity,
        budget: Budget,
        clock: Clock = lambda: datetime.now(UTC),
        head_file: Path | None = None,
    ) -> None:
        """Open or make a ledger; the first use writes `budget` into it.

        Args:
            location: a path (SQLite) or a PostgreSQL URL.
            key: signs what is written; everything in the ledger must be signed by it.
            data: the units about to be used.
            budget: the site file's.
            clock: dates the entries; nothing is decided by it.
            head_file: see `Journal`.

        Raises:
            PrivacyError: the ledger cannot be opened, was tampered with, or disagrees with the file about δ or unit.
        """
        self._journal = Journal(location, key, clock, head_file)
        self._data = data
        self._file_budget = budget
        self._overlaps: dict[str, bool] = {data.fingerprint: True}
        with self._journal.writing() as pen:
            stored = stored_budget(pen.entries)
            if stored is None:
                pen.write("budget", budget_content(budget, FROM_SITE_FILE))
                stored = budget
            effective_budget(stored, budget)
        if budget.epsilon > stored.epsilon:
            _log.warning(
                "the site file's budget of ε=%g has no effect, the ledger's is %g; to raise it: "
                "cloister ledger set-budget --epsilon %g --reason WHY",
                budget.epsilon,
                stored.epsilon,
                budget.epsilon,
            )

    def reserve(self, booking: Booking, *, fresh: bool = False) -> Reservation:
        """Book the round and return the reservation; when this returns, the entry is on disk.

        Args:
            booking: what is about to be executed.
            fresh: do not replay: a new attempt, with other noise, which is charged.

        Raises:
            BudgetExceeded: with what is spent, what it would become, and the budget. Nothing is booked then.
        """
        with self._journal.writing() as pen:
            concerned = self._concerned(pen.transaction)
            earlier = charges_of(pen.entries, concerned)
            same = [charge for charge in earlier if self._is_replay(charge, booking)]
            if same and not fresh:
                replayed = self._replay(pen.entries, earlier, same[-1], concerned)
                # What has left may leave again; what has not, not above a budget that was lowered since.
                if replayed.output_digest is None:
                    self._check(pen.entries, booking, earlier[:-1], self._state(pen.entries, earlier, concerned))
                return replayed
            return self._book(pen, booking, earlier, concerned)

    def commit(self, reservation: Reservation, output_digest: str) -> None:
        """Write that the reserved steps were executed; called before anything leaves the site.

        Raises:
            ReplayDiverged: this attempt was committed before with another output; nothing may leave.
            PrivacyError: the ledger holds no such reservation.
        """
        with self._journal.writing() as pen:
            reserved = pen.entries[reservation.entry - 1] if reservation.entry <= len(pen.entries) else None
            if reserved is None or reserved.kind != "reserve":
                raise PrivacyError(f"entry {reservation.entry} of the ledger is no reservation; reserve, then commit")
            before = _committed_output(pen.entries, reservation.entry)
            if before is None:
                content = {"reserve": reservation.entry, "attempt": reservation.attempt, "output_digest": output_digest}
                pen.write("commit", content, reserved.fingerprint)
            elif before != output_digest:
                raise ReplayDiverged(
                    f"attempt {reservation.attempt} of round {reserved.content['round']} gave output "
                    f"{output_digest[:12]} where it had given {before[:12]}: the same noise on different gradients "
                    "would reveal their difference, so nothing may leave; reserve a fresh attempt, which is charged"
                )

    def spent(self, run: str | None = None) -> float:
        """Return the ε of everything booked on this data (by one run), reserved entries included, at the budget's δ."""
        with self._journal.reading() as (transaction, entries):
            concerned = self._concerned(transaction)
            charges = [charge for charge in charges_of(entries, concerned) if run in (None, charge.run)]
            return self._state(entries, charges, concerned).epsilon

    def mechanisms(self, run: str | None = None) -> list[SubsampledGaussian]:
        """Return everything booked on this data (by one run), in order."""
        with self._journal.reading() as (transaction, entries):
            charges = charges_of(entries, self._concerned(transaction))
            return [charge.mechanism for charge in charges if run in (None, charge.run)]

    def account(self, run: str) -> Account:
        """Return what this site may say in public of a run, all of it as of one moment."""
        with self._journal.reading() as (transaction, entries):
            everything = frozenset(transaction.fingerprints())
            charges = charges_of(entries, everything)
            of_run = [charge for charge in charges if charge.run == run]
            budget = self._budget(entries)
            admitting = [entry.content["budget"] for entry in entries if entry.kind == "reserve"]
            # An ε that was admitted at a larger δ says nothing of this one's.
            bounds = all(each["delta"] <= budget.delta for each in admitting)
            return Account(
                run=self._state(entries, of_run, everything),
                total=self._state(entries, charges, everything),
                budget=budget,
                admitted=max((each["epsilon"] for each in admitting), default=0.0) if bounds else math.inf,
                steps=sum(charge.mechanism.steps for charge in of_run),
                mechanisms=gathered(charge.mechanism for charge in of_run),
            )

    def charges(self, run: str) -> tuple[Charge, ...]:
        """Return what a run booked on this data, in order."""
        with self._journal.reading() as (transaction, entries):
            return tuple(each for each in charges_of(entries, self._concerned(transaction)) if each.run == run)

    def refuses_other_inputs(self, run: str, round_number: int, inputs_digest: str) -> bool:
        """Return whether this round of this run was committed, on any data set, and never with these inputs."""
        with self._journal.reading() as (_, entries):
            committed = {entry.content["reserve"] for entry in entries if entry.kind == "commit"}
            answered = [
                charge
                for charge in _all_charges(entries)
                if (charge.run, charge.round) == (run, round_number) and charge.sequence in committed
            ]
        return bool(answered) and all(charge.inputs_digest != inputs_digest for charge in answered)

    @property
    def head(self) -> str:
        """The hash (hex) of the last entry. Public: it covers keyed hashes, and tells nothing that they do not."""
        with self._journal.reading() as (_, entries):
            return entries[-1].hash

    def holds(self, head: str) -> bool:
        """Return whether an entry has this hash: a ledger that ended there before has only been added to since."""
        with self._journal.reading() as (_, entries):
            return any(entry.hash == head for entry in entries)

    @property
    def budget(self) -> Budget:
        """The budget that holds now: the smaller of the site file's and the ledger's."""
        with self._journal.reading() as (_, entries):
            return self._budget(entries)

    def close(self) -> None:
        """Release the database."""
        self._journal.close()

    def _is_replay(self, charge: Charge, booking: Booking) -> bool:
        return (charge.fingerprint, charge.run, charge.round, charge.mechanism, charge.inputs_digest) == (
            self._data.fingerprint,
            booking.run,
            booking.round,
            booking.mechanism,
            booking.inputs_digest,
        )

    def _replay(
        self, entries: Sequence[Entry], charges: Sequence[Charge], charge: Charge, concerned: frozenset[str]
    ) -> Reservation:
        return Reservation(
            entry=charge.sequence,
            epsilon_after=self._state(entries, charges, concerned).epsilon,
            attempt=charge.attempt,
            replayed=True,
            output_digest=_committed_output(entries, charge.sequence),
        )

    def _book(self, pen: Pen, booking: Booking, earlier: tuple[Charge, ...], concerned: frozenset[str]) -> Reservation:
        budget = self._budget(pen.entries)
        if self._data.fingerprint not in pen.transaction.fingerprints():
            pen.transaction.add_data_set(self._data)
        declared = schedules_of(pen.entries, concerned, booking.run)
        if booking.schedule not in declared:
            content = {
                "run": booking.run,
                "plan_digest": booking.plan_digest,
                "mechanism": booking.schedule.to_json(),
            }
            pen.write("schedule", content, self._data.fingerprint)
        attempt = 1 + max(
            (charge.attempt for charge in _all_charges(pen.entries) if charge.inputs_digest == booking.inputs_digest),
            default=0,
        )
        charge = Charge(
            len(pen.entries) + 1,
            self._data.fingerprint,
            booking.run,
            booking.round,
            booking.mechanism,
            booking.inputs_digest,
            attempt,
            booking.plan_digest,
        )
        after = self._state(pen.entries, (*earlier, charge), concerned)
        self._check(pen.entries, booking, earlier, after)
        entry = pen.write("reserve", _reserve_content(booking, attempt, after, budget), self._data.fingerprint)
        return Reservation(entry.sequence, after.epsilon, attempt, replayed=False, output_digest=None)

    def _check(self, entries: Sequence[Entry], booking: Booking, earlier: Sequence[Charge], after: Stated) -> None:
        budget = self._budget(entries)
        if after.epsilon <= budget.epsilon * (1 + _TOLERANCE):
            return
        # Also where it is unknown (NaN).
        before = state(after.rule, earlier, budget, entries)
        raise BudgetExceeded(
            f"round {booking.round} would raise this site's ε from {before.epsilon:.3f} to {after.epsilon:.3f}, "
            f"above its budget of {budget.epsilon:g} at δ={budget.delta:.3g} "
            f"({RULES[after.rule]}); nothing was trained"
        )

    def _state(self, entries: Sequence[Entry], charges: Sequence[Charge], concerned: frozenset[str]) -> Stated:
        schedules = schedules_of(entries, concerned, charges[-1].run) if charges else ()
        return state(rule_for(charges, schedules), charges, self._budget(entries), entries)

    def _budget(self, entries: Sequence[Entry]) -> Budget:
        stored = stored_budget(entries)
        return self._file_budget if stored is None else effective_budget(stored, self._file_budget)

    def _concerned(self, transaction: Transaction) -> frozenset[str]:
        """Return the fingerprints of all data sets that share a unit with this one, and its own."""
        for fingerprint in transaction.fingerprints() - self._overlaps.keys():
            self._overlaps[fingerprint] = self._data.overlaps(transaction.data_set(fingerprint))
        return frozenset(fingerprint for fingerprint, shared in self._overlaps.items() if shared)


def _all_charges(entries: Sequence[Entry]) -> tuple[Charge, ...]:
    return charges_of(entries, {entry.fingerprint for entry in entries})


def _committed_output(entries: Sequence[Entry], reserve: int) -> str | None:
    for entry in entries:
        if entry.kind == "commit" and entry.content["reserve"] == reserve:
            return entry.content["output_digest"]
    return None


def _reserve_content(booking: Booking, attempt: int, after: Stated, budget: Budget) -> dict[str, object]:
    return {
        "run": booking.run,
        "round": booking.round,
        "plan_digest": booking.plan_digest,
        "mechanism": booking.mechanism.to_json(),
        "inputs_digest": booking.inputs_digest,
        "attempt": attempt,
        "epsilon_after": after.epsilon,
        "rule": after.rule,
        "budget": {"epsilon": budget.epsilon, "delta": budget.delta, "unit": budget.unit},
    }
