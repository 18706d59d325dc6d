"""Whether a ledger is what the site once wrote, and whether its figures are true.

What can be found: an entry that was altered, removed from the middle, inserted, moved, or signed by another key; a data
set whose units were changed or that was taken away; a figure that is not what was booked comes to; an admission beyond
the budget. What cannot be found from the ledger alone: that its last entries were cut off, or that whoever holds the
private key wrote it anew. Both show against a head (the last entry's hash) that was noted elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from privacy.accounting import rdp_epsilon_of
from privacy.identity import overlapping
from privacy.ledger.admission import Charge, Rule, charges_of, filter_of, rule_for, schedules_of, state
from privacy.ledger.budget import Budget, stored_budget
from privacy.ledger.chain import GENESIS, Entry, first_fault
from privacy.ledger.keys import VerifyingKey
from privacy.ledger.recompute import Recomputation, renyi_cost, steps_of
from privacy.ledger.store import Snapshot
from privacy.mechanisms import SubsampledGaussian
from privacy.renyi import conversion

__all__ = ["Figure", "Problem", "Verification", "figures_of", "structural_problems", "verify"]

_SAME = 0.02
"""Relative; the grid of the accountant converges to one percent, and a later release may converge further."""
_OVER_RENYI = 1.02


@dataclass(frozen=True)
class Problem:
    """Something that is not as it must be."""

    sequence: int | None
    """The entry concerned; None where it is none in particular."""
    text: str


@dataclass(frozen=True)
class Figure:
    """One stated ε beside what it was recomputed to be."""

    sequence: int
    run: str
    round: int
    rule: Rule
    """That the entries ask for."""
    stated_rule: str
    stated: float
    recomputed: float
    """By the same rule; a declared schedule by another accountant, and only where that cannot tell by the same."""
    at_most: float | None
    """An upper bound by Rényi DP; None for the filter, which may exceed it."""
    at_least: float
    """A lower bound by privacy losses that are rounded down; for the filter also its Rényi cost, by integration."""
    budget: Budget


@dataclass(frozen=True)
class Verification:
    """What was found. No problem means that all checks passed."""

    entries: int
    head: str
    """The last entry's hash: note it, to notice later whether entries were cut off."""
    problems: tuple[Problem, ...]
    figures: tuple[Figure, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


def verify(snapshot: Snapshot, key: VerifyingKey, head: str | None = None) -> Verification:
    """Check the chain, then the data sets, then every figure; figures of a broken chain mean nothing and are left out.

    Args:
        snapshot: the ledger.
        key: the site's public key, from the site and not from whoever brought the ledger.
        head: an entry's hash, or its first 12 digits or more, that was noted earlier.
    """
    entries = snapshot.entries
    last = entries[-1].hash if entries else GENESIS
    broken = (*structural_problems(snapshot, key), *_head_problems(entries, head))
    if broken:
        return Verification(len(entries), last, broken, ())
    figures = figures_of(snapshot)
    budgets = _budget_problems(entries, figures)
    return Verification(len(entries), last, (*_figure_problems(figures), *budgets), figures)


def structural_problems(snapshot: Snapshot, key: VerifyingKey | None) -> tuple[Problem, ...]:
    """Return the first fault of the chain, or else what is wrong with data sets and commits.

    Args:
        snapshot: the ledger.
        key: the site's public key; None leaves the signatures unchecked.
    """
    fault = first_fault(snapshot.entries, key)
    if fault is not None:
        return (Problem(fault.sequence, fault.text),)
    return (*_data_problems(snapshot), *_commit_problems(snapshot.entries))


def figures_of(snapshot: Snapshot) -> tuple[Figure, ...]:
    """Return every reservation's stated ε beside its recomputations, in order."""
    entries = snapshot.entries
    concerned = overlapping(snapshot.data_sets)
    charges = charges_of(entries, snapshot.data_sets)
    again = Recomputation([charge.mechanism for charge in charges])
    figures: list[Figure] = []
    for charge in charges:
        shared = concerned[charge.fingerprint]
        until = entries[: charge.sequence]
        booked = [one for one in charges if one.sequence <= charge.sequence and one.fingerprint in shared]
        rule = rule_for(booked, schedules_of(until, shared, charge.run))
        figures.append(_figure(entries[charge.sequence - 1], until, booked, rule, again))
    return tuple(figures)


def _figure(
    entry: Entry, until: Sequence[Entry], charges: Sequence[Charge], rule: Rule, again: Recomputation
) -> Figure:
    content = entry.content
    budget, stated = Budget(**content["budget"]), content["epsilon_after"]
    mechanisms = [charge.mechanism for charge in charges]
    at_least = again.at_least(mechanisms, budget.delta)
    recomputed = again.at_most(mechanisms, budget.delta) if rule == "schedule" else None
    if recomputed is None or not _is_same(stated, recomputed):
        recomputed = state(rule, charges, budget, until, entry.schema_version).epsilon
    if rule == "filter":
        at_least = max(at_least, _filtered(mechanisms, budget, until, entry.schema_version))
    return Figure(
        sequence=entry.sequence,
        run=content["run"],
        round=content["round"],
        rule=rule,
        stated_rule=content["rule"],
        stated=stated,
        recomputed=recomputed,
        at_most=_renyi_epsilon(mechanisms, budget.delta) if rule == "schedule" else None,
        at_least=at_least,
        budget=budget,
    )


def _filtered(mechanisms: Sequence[SubsampledGaussian], budget: Budget, until: Sequence[Entry], version: int) -> float:
    """Return what the filter must state at least: its cost without cuts, by integration."""
    chosen = filter_of(budget, until, version=version)
    if chosen is None:
        return math.inf
    cost = renyi_cost(mechanisms, chosen.order)
    return max(0.0, cost + float(conversion(chosen.order, budget.delta))) if cost else 0.0


def _renyi_epsilon(mechanisms: Sequence[SubsampledGaussian], delta: float) -> float:
    return rdp_epsilon_of([one.repeated(count) for one, count in steps_of(mechanisms).items()], delta)


def _is_same(stated: float, recomputed: float) -> bool:
    return math.isclose(stated, recomputed, rel_tol=_SAME, abs_tol=1e-6)


def _head_problems(entries: Sequence[Entry], head: str | None) -> Iterator[Problem]:
    if head is None:
        return
    if not re.fullmatch(r"[0-9a-f]{12,64}", head):
        yield Problem(None, f"the noted head {head!r} is no hash; give at least 12 of its hex digits")
    elif not any(entry.hash.startswith(head) for entry in entries):
        yield Problem(
            None,
            f"no entry has the hash {head[:12]} that was noted: entries were cut off at the end, or all were rewritten",
        )


def _data_problems(snapshot: Snapshot) -> Iterator[Problem]:
    named = {entry.fingerprint: entry.sequence for entry in reversed(snapshot.entries) if entry.fingerprint}
    for fingerprint, sequence in named.items():
        if fingerprint not in snapshot.data_sets:
            yield Problem(sequence, f"the data set {fingerprint[:12]} of entry {sequence} is missing")
    for fingerprint, data in snapshot.data_sets.items():
        if data.fingerprint != fingerprint:
            yield Problem(
                named.get(fingerprint), f"the units of data set {fingerprint[:12]} were altered: they no longer give it"
            )
        elif fingerprint not in named:
            yield Problem(
                None,
                f"no entry names the data set {fingerprint[:12]}: the entries that used it were cut off at the end",
            )


def _commit_problems(entries: Sequence[Entry]) -> Iterator[Problem]:
    committed: dict[int, int] = {}
    for entry in entries:
        if entry.kind != "commit":
            continue
        number = entry.content["reserve"]
        if not (0 < number < entry.sequence and entries[number - 1].kind == "reserve"):
            yield Problem(entry.sequence, f"entry {entry.sequence} commits entry {number}, which is no reservation")
        elif number in committed:
            yield Problem(
                entry.sequence, f"entry {entry.sequence} commits entry {number} again, after entry {committed[number]}"
            )
        committed.setdefault(number, entry.sequence)


def _figure_problems(figures: Sequence[Figure]) -> Iterator[Problem]:
    """Yield what is wrong with the figures themselves."""
    for figure in figures:
        where = f"entry {figure.sequence} states ε={figure.stated:.4f}"
        if figure.stated_rule != figure.rule:
            yield Problem(
                figure.sequence,
                f"entry {figure.sequence} was admitted by the rule {figure.stated_rule!r}, but what is booked asks for "
                f"{figure.rule!r}",
            )
        if not _is_same(figure.stated, figure.recomputed):
            yield Problem(figure.sequence, f"{where}, but what is booked comes to {figure.recomputed:.4f}")
        elif figure.at_most is not None and figure.stated > figure.at_most * _OVER_RENYI:
            yield Problem(figure.sequence, f"{where}, above the {figure.at_most:.4f} that Rényi DP guarantees")
        elif figure.stated < figure.at_least * (1 - _SAME):
            yield Problem(figure.sequence, f"{where}, but the true value is at least {figure.at_least:.4f}")


def _budget_problems(entries: Sequence[Entry], figures: Sequence[Figure]) -> Iterator[Problem]:
    for figure in figures:
        stored = stored_budget(entries[: figure.sequence])
        allowed = figure.budget
        if (
            stored is None
            or allowed.epsilon > stored.epsilon
            or (allowed.delta, allowed.unit)
            != (
                stored.delta,
                stored.unit,
            )
        ):
            yield Problem(figure.sequence, f"entry {figure.sequence} was admitted under a budget that was not in force")
        elif figure.stated > allowed.epsilon * (1 + 1e-9):
            yield Problem(
                figure.sequence,
                f"entry {figure.sequence} was admitted at ε={figure.stated:.4f}, above the budget of "
                f"{allowed.epsilon:g}",
            )
