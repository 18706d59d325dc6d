"""What must hold before a round starts: room on the disk, books that can be read, a clock that moves forward."""

from __future__ import annotations

import shutil
from datetime import datetime, timedelta
from pathlib import Path

from client.site_file import ledger_location
from conf.schema.site import SiteFile
from privacy.ledger import HEAD_FILE, SITE_LEDGER_FILE, head_file
from privacy.ledger.journal import Journal
from privacy.ledger.keys import load_or_create_keys
from protocol.errors import PrivacyError, SiteRefusal

__all__ = ["check_books", "check_space"]

_CLOCK_SLACK = timedelta(minutes=2)
"""NTP may step a clock back by less."""


def check_space(file: SiteFile) -> int:
    """Return the free MiB of the state directory's disk.

    Raises:
        SiteRefusal: code `no_space`, below `serve.min_free_mib`: a round that cannot be booked must not begin.
    """
    free = shutil.disk_usage(file.state_directory).free >> 20
    if free < file.serve.min_free_mib:
        raise SiteRefusal("no_space", f"{free} MiB are free, below serve.min_free_mib={file.serve.min_free_mib}")
    return free


def check_books(file: SiteFile, now: datetime) -> int:
    """Return how many entries the ledgers have, having checked chain, signatures, head and dates; writes nothing.

    Both are looked at in every round, that of the records and that of the whole site: a clock that went back behind
    either one would revive a budget that has expired.

    Raises:
        SiteRefusal: `ledger_unusable`, or `clock` when the last entry of either is younger than `now`.
    """
    folder = Path(file.state_directory)
    whole = folder / SITE_LEDGER_FILE
    return _check_book("records", ledger_location(file), folder / HEAD_FILE, now) + _check_book(
        "whole site", whole, head_file(folder, whole), now
    )


def _check_book(name: str, where: str | Path, head: Path, now: datetime) -> int:
    """Return how many entries one ledger has; 0 where nothing was ever booked."""
    try:
        if not head.exists() and not isinstance(where, str) and not where.exists():
            return 0
        journal = Journal(where, load_or_create_keys(head.parent).signing, head_file=head)
        try:
            with journal.reading() as (_, entries):
                last = datetime.fromisoformat(entries[-1].at) if entries else None
        finally:
            journal.close()
    except (PrivacyError, OSError) as error:
        raise SiteRefusal("ledger_unusable", str(error)) from error
    if last is not None and now < last - _CLOCK_SLACK:
        raise SiteRefusal(
            "clock", f"it is {now.isoformat()}, the last entry of the ledger ({name}) is of {last.isoformat()}"
        )
    return len(entries)
