"""What everything that is booked comes to, and by which rule: an exact composition, or a filter.

* **Schedule.** One run alone, whose whole mechanism was declared before its first step and of which no parameter was
  changed: privacy loss distributions compose exactly. They require parameters that do not depend on outputs, and these
  do not.
* **Filter.** A second run, changed parameters, or steps beyond the schedule: somebody may have chosen them after
  looking at outputs. A Rényi filter of one order, fixed in advance, stays valid then (Feldman and Zrnic 2021, arXiv
  2008.11193, Theorem 4.3; Rogers et al. 2016, arXiv 1605.08294, for why composition theorems alone do not).

By each rule the budget bounds every sequence of rounds, stopped whenever anybody likes. What is spent before a run's
end is information: whoever stops *because of* an output should quote the budget. Whoever starts a second run because of
the first one's outputs relies on both rules at once; each may fail with probability δ, so that in the worst case 2δ
holds (docs/decisions/0007-ledger.md).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from privacy.accounting import epsilon_of
from privacy.filter import RenyiFilter
from privacy.ledger.budget import Budget
from privacy.ledger.chain import SCHEMA_VERSION, Entry
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import PrivacyError

__all__ = ["RULES", "Charge", "Rule", "Stated", "charges_of", "filter_of", "rule_for", "schedules_of", "state"]

_ORDER_PER_DELTA = 2
"""Up to this schema version a change of the budget's δ changed the filter's order too."""

Rule = Literal["schedule", "filter"]

RULES: dict[Rule, str] = {
    "schedule": "a schedule fixed in advance, composed exactly",
    "filter": "the Rényi filter, because parameters may have been chosen after earlier outputs",
}


@dataclass(frozen=True)
class Charge:
    """One reservation, as an entry holds it."""

    sequence: int
    fingerprint: str
    run: str
    round: int
    mechanism: SubsampledGaussian
    inputs_digest: str
    attempt: int
    plan_digest: str


@dataclass(frozen=True)
class Stated:
    """An ε, and the rule that vouches for it."""

    epsilon: float
    rule: Rule


def charges_of(entries: Iterable[Entry], fingerprints: Collection[str]) -> tuple[Charge, ...]:
    """Return what is booked on any of the data sets, reserved and committed alike, in order."""
    found: list[Charge] = []
    for entry in entries:
        if entry.kind == "reserve" and entry.fingerprint in fingerprints:
            content = entry.content
            mechanism = SubsampledGaussian.from_json(content["mechanism"])
            found.append(
                Charge(
                    entry.sequence,
                    entry.fingerprint,
                    content["run"],
                    content["round"],
                    mechanism,
                    content["inputs_digest"],
                    content["attempt"],
                    content["plan_digest"],
                )
            )
    return tuple(found)


def schedules_of(entries: Iterable[Entry], fingerprints: Collection[str], run: str) -> tuple[SubsampledGaussian, ...]:
    """Return the whole mechanisms that a run declared on any of the data sets, in order; more than one is a change."""
    return tuple(
        SubsampledGaussian.from_json(entry.content["mechanism"])
        for entry in entries
        if entry.kind == "schedule" and entry.fingerprint in fingerprints and entry.content["run"] == run
    )


def rule_for(charges: Sequence[Charge], schedules: Sequence[SubsampledGaussian]) -> Rule:
    """Return the rule for these charges, `schedules` being what the run of the last of them has declared."""
    if not charges:
        return "schedule"
    if len({charge.run for charge in charges}) > 1 or len(set(schedules)) != 1:
        return "filter"
    declared = schedules[0]
    as_declared = all(charge.mechanism.repeated(declared.steps) == declared for charge in charges)
    within = sum(charge.mechanism.steps for charge in charges) <= declared.steps
    return "schedule" if as_declared and within else "filter"


def state(
    rule: Rule, charges: Iterable[Charge], budget: Budget, entries: Sequence[Entry], version: int = SCHEMA_VERSION
) -> Stated:
    """Return the ε of `charges` at the budget's δ, by `rule` as of `version`; `entries` fix the filter's order.

    By the filter it is infinite where the budget was too small for any.
    """
    mechanisms = [charge.mechanism for charge in charges]
    if rule == "schedule":
        return Stated(epsilon_of(mechanisms, budget.delta), rule)
    chosen = filter_of(budget, entries, mechanisms, version=version)
    return Stated(math.inf if chosen is None else chosen.epsilon_of(mechanisms), rule)


def filter_of(
    budget: Budget,
    entries: Sequence[Entry],
    booked: Sequence[SubsampledGaussian] = (),
    *,
    version: int = SCHEMA_VERSION,
) -> RenyiFilter | None:
    """Return the filter that counts what is booked at the budget's δ; None where no order left anything at first.

    Its order must not depend on outputs. So it follows from the ledger's first booking, made before there were any:
    from ε and δ of the budget then, and from the steps that were booked. A budget that is lowered or raised later, in ε
    or in δ, moves the limit, not the order. Where `entries` hold no booking yet, `booked` begins with the first.

    Entries of version 1 say that the order follows from the budget alone. Figures stated by entries up to `version` 2
    were computed at an order of their δ: from the first booking at the same δ, or before there was one from the budget.
    """
    reserved = [entry for entry in entries if entry.kind == "reserve"]
    if version <= _ORDER_PER_DELTA:
        reserved = [entry for entry in reserved if entry.content["budget"]["delta"] == budget.delta]
    first, expected = budget, booked[0] if booked and version > _ORDER_PER_DELTA else None
    if reserved:
        first = Budget(**reserved[0].content["budget"])
        mechanism = reserved[0].content["mechanism"]
        expected = SubsampledGaussian.from_json(mechanism) if reserved[0].schema_version > 1 else None
    try:
        return RenyiFilter(first.epsilon, first.delta, expected).restated(budget.epsilon, budget.delta)
    except PrivacyError:  # so small a budget that no order leaves anything for adaptive choices
        return None
