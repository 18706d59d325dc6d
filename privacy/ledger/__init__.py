"""A site's record of what it has spent: durable, append-only, hash-chained, signed, and asked before every round."""

from privacy.ledger.admission import Charge
from privacy.ledger.budget import Budget
from privacy.ledger.keys import (
    HEAD_FILE,
    SITE_LEDGER_FILE,
    SigningKey,
    SiteKeys,
    VerifyingKey,
    head_file,
    load_or_create_keys,
    open_private,
)
from privacy.ledger.ledger import Account, Booking, Ledger, Reservation

__all__ = [
    "HEAD_FILE",
    "SITE_LEDGER_FILE",
    "Account",
    "Booking",
    "Budget",
    "Charge",
    "Ledger",
    "Reservation",
    "SigningKey",
    "SiteKeys",
    "VerifyingKey",
    "head_file",
    "load_or_create_keys",
    "open_private",
]
