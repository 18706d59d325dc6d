"""The budget: what one protected unit may ever cost, over all runs, as the site's file and its ledger have agreed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from privacy.ledger.chain import Entry
from protocol.errors import PrivacyError

__all__ = ["FROM_SITE_FILE", "Budget", "budget_content", "check_change", "effective_budget", "stored_budget"]

FROM_SITE_FILE = "site file"
"""The reason of the first budget entry, when the ledger was not made by `cloister ledger init`."""


@dataclass(frozen=True)
class Budget:
    """The most one unit of a site may ever cost, over all runs: ε at δ."""

    epsilon: float
    delta: float
    unit: str = "record"

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and 0 < self.delta < 1 and self.unit):
            raise PrivacyError(f"{self} is no budget: epsilon > 0 and finite, delta in (0, 1), a unit")


def budget_content(budget: Budget, reason: str) -> dict[str, float | str]:
    """Return the payload of a budget entry."""
    return {"epsilon": budget.epsilon, "delta": budget.delta, "unit": budget.unit, "reason": reason}


def stored_budget(entries: Sequence[Entry]) -> Budget | None:
    """Return the budget that the last budget entry sets; None when there is none."""
    for entry in reversed(entries):
        if entry.kind == "budget":
            content = entry.content
            return Budget(content["epsilon"], content["delta"], content["unit"])
    return None


def effective_budget(stored: Budget, file: Budget) -> Budget:
    """Return the budget that holds: the smaller ε of the ledger's and the site file's.

    Raises:
        PrivacyError: they disagree about δ or about the unit; then neither ε says anything about the other.
    """
    if not math.isclose(stored.delta, file.delta, rel_tol=1e-9) or stored.unit != file.unit:
        raise PrivacyError(
            f"the site file's budget is at δ={file.delta:.3g} per {file.unit}, the ledger's at δ={stored.delta:.3g} "
            f"per {stored.unit}; make the file agree, or run: cloister ledger set-budget --epsilon {file.epsilon:g} "
            f"--delta {file.delta:g} --unit {file.unit} --reason WHY"
        )
    return replace(stored, epsilon=min(stored.epsilon, file.epsilon))


def check_change(old: Budget | None, new: Budget, reason: str, has_bookings: bool) -> None:
    """Refuse a change of the budget that must not be made, or not without saying why.

    Raises:
        PrivacyError: more ε or δ than before without a reason, or another unit after something was booked.
    """
    if old is None:
        return
    if new.unit != old.unit and has_bookings:
        raise PrivacyError(
            f"what is booked was counted per {old.unit} and says nothing per {new.unit}; keep --unit {old.unit}, or "
            "start another ledger for data that was never used"
        )
    if (new.epsilon > old.epsilon or new.delta > old.delta) and not reason.strip():
        raise PrivacyError(
            f"raising the budget from ε={old.epsilon:g}, δ={old.delta:.3g} to ε={new.epsilon:g}, δ={new.delta:.3g} "
            "needs a reason, which stays in the ledger; add --reason WHY"
        )
