"""What a site's ledgers say before a round is booked: have they been set back, was the round answered for other inputs.

Both are asked of the ledgers themselves, whatever else the site still keeps: stored replies are removed with time, and
all files of a site may come out of one old backup.
"""

from __future__ import annotations

from collections.abc import Mapping

from privacy.ledger import Ledger
from protocol.errors import SiteRefusal
from protocol.instructions import InstructionHeader, LedgerName

__all__ = ["check_ledgers", "heads_of"]


def check_ledgers(header: InstructionHeader, ledgers: Mapping[LedgerName, Ledger], inputs_digest: str) -> None:
    """Refuse a round that one of the ledgers speaks against; nothing is booked yet.

    Raises:
        SiteRefusal: `ledger_set_back`, when an entry that this site stated before is missing; `replay_mismatch`, when
            the round of the run was committed before, and not with these inputs.
    """
    for name, ledger in ledgers.items():
        stated = header.ledger_heads.get(name)
        if stated is not None and not ledger.holds(stated):
            raise SiteRefusal(
                "ledger_set_back",
                f"the ledger ({name}) lacks the entry {stated[:12]}, at which it ended when this site answered that "
                "server before: it was set back to an older copy, and would forget what was spent since; restore the "
                "newest copy",
            )
        if ledger.refuses_other_inputs(header.plan.run, header.round, inputs_digest):
            raise SiteRefusal(
                "replay_mismatch",
                f"the ledger ({name}) holds round {header.round} of run {header.plan.run!r} as committed, with other "
                "inputs: another adapter, another plan, or other records",
            )


def heads_of(ledgers: Mapping[LedgerName, Ledger]) -> dict[LedgerName, str]:
    """Return the hash of each ledger's last entry, for a server to remind this site of."""
    return {name: ledger.head for name, ledger in ledgers.items()}
