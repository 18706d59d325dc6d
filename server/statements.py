"""What sites state of their privacy: checked when it arrives, and priced when a run is summed up.

A site may state what it likes, so nothing that it states may end a run: not when a reply is taken in, and least of all
when all rounds are over and every budget is spent.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from privacy.accounting import epsilon_of, epsilon_over_sites, rdp_epsilon_of
from privacy.mechanisms import MOST_STEPS, SubsampledGaussian
from privacy.renyi import renyi_over_sites
from protocol.errors import PrivacyError, ReplyRejected
from protocol.instructions import PrivacyStatement

__all__ = ["checked_statement", "epsilon_of_group", "epsilon_over_several"]

_log = logging.getLogger(__name__)

_MOST_MECHANISMS = 256
"""Sets of parameters in one statement; a run has one, and one more whenever its plan was changed."""
_EXACT_MECHANISMS, _EXACT_STEPS, _EXACT_EPSILON = 64, 10**7, 100.0
"""Above these, loss distributions take minutes and gigabytes; no plan that protects anybody comes near."""


def checked_statement(statement: PrivacyStatement | None) -> PrivacyStatement | None:
    """Return a site's statement, whose mechanisms can be read. That its figures are finite, decoding has seen to.

    Raises:
        ReplyRejected: code `malformed_reply`.
    """
    if statement is None:
        return None
    if statement.steps_executed > MOST_STEPS:
        raise ReplyRejected("malformed_reply", f"the privacy statement has more than {MOST_STEPS:.0e} steps")
    if statement.delta is not None and not 0 <= statement.delta < 1:
        raise ReplyRejected("malformed_reply", f"the privacy statement has delta={statement.delta:g}, not in [0, 1)")
    stated = [*statement.mechanisms, *([statement.mechanism] if statement.mechanism else [])]
    if len(stated) > _MOST_MECHANISMS:
        raise ReplyRejected(
            "malformed_reply", f"the privacy statement has {len(stated)} mechanisms, above {_MOST_MECHANISMS}"
        )
    try:
        for each in stated:
            SubsampledGaussian.from_json(each)
    except PrivacyError as error:
        raise ReplyRejected("malformed_reply", f"the privacy statement cannot be read: {str(error)[:200]}") from error
    return statement


def epsilon_over_several(stated: Sequence[PrivacyStatement], several: int) -> float | None:
    """Return an ε for a person who is known at `several` of the sites, at the largest δ that any states; None, unknown,
    where a statement holds nothing that an accountant could price.

    Statements as no plan gives them are priced by Rényi costs: an upper bound as well, and computed at once.
    """
    delta = max((statement.delta or 0.0 for statement in stated), default=0.0)
    try:
        executed = [_executed(statement) for statement in stated]
        if not all(executed):
            return None
        overlap = min(several, len(executed))
        if all(_is_ordinary(each, delta) for each in executed):
            return epsilon_over_sites(executed, delta, overlap=overlap)
        return _number(renyi_over_sites(executed, delta, overlap))
    except Exception as error:  # of the accountant's arithmetic, at the far ends of the floating-point numbers
        _log.warning("what the sites state cannot be priced, so ε over several sites is unknown: %s", error)
        return None


def epsilon_of_group(statement: PrivacyStatement, size: int) -> float | None:
    """Return ε of the server's own promise for `size` whole sites together; None where it states no mechanism."""
    executed = _executed(statement)
    return epsilon_of(executed, statement.delta or 0.0, group_size=size) if executed else None


def _executed(statement: PrivacyStatement) -> list[SubsampledGaussian]:
    return [SubsampledGaussian.from_json(each) for each in statement.mechanisms]


def _is_ordinary(executed: Sequence[SubsampledGaussian], delta: float) -> bool:
    if len(executed) > _EXACT_MECHANISMS or sum(each.steps for each in executed) > _EXACT_STEPS:
        return False
    return rdp_epsilon_of(executed, delta) <= _EXACT_EPSILON


def _number(epsilon: float) -> float | None:
    return None if math.isnan(epsilon) else epsilon
