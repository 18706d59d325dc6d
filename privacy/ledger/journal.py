"""A ledger's entries as one signed chain: read only when intact, and only ever added to."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from privacy.ledger.budget import Budget, budget_content, check_change, stored_budget
from privacy.ledger.chain import Entry, Kind, first_fault, seal
from privacy.ledger.keys import SigningKey, open_private
from privacy.ledger.store import Store, Transaction
from protocol.errors import LedgerUnusable

__all__ = ["Clock", "Journal", "Pen"]

Clock = Callable[[], datetime]


class Pen:
    """The right to add entries, while nobody else can; `entries` includes those that were added."""

    def __init__(self, transaction: Transaction, entries: tuple[Entry, ...], key: SigningKey, clock: Clock) -> None:
        self.transaction = transaction
        self.entries = entries
        self._key = key
        self._clock = clock

    def write(self, kind: Kind, content: Mapping[str, Any], fingerprint: str = "") -> Entry:
        """Add one entry and return it."""
        last = self.entries[-1] if self.entries else None
        entry = seal(self._key, last, kind, self._clock(), fingerprint, content)
        self.transaction.append(entry)
        self.entries = (*self.entries, entry)
        return entry


class Journal:
    """The chain in one store, under one site's key."""

    def __init__(
        self,
        location: str | Path,
        key: SigningKey,
        clock: Clock = lambda: datetime.now(UTC),
        head_file: Path | None = None,
    ) -> None:
        """Open or make a journal.

        Args:
            location: a path (SQLite) or a PostgreSQL URL.
            key: signs what is written.
            clock: dates the entries.
            head_file: keeps the hash of the last entry outside of the journal, so that a journal that was lost, cut or
                set back to an older copy is noticed.

        Raises:
            LedgerUnusable: the store cannot be opened.
        """
        self._store = Store(location)
        self._key = key
        self._clock = clock
        self._head_file = head_file
        self._trusted: frozenset[str] = frozenset()

    @contextmanager
    def writing(self) -> Generator[Pen, None, None]:
        """Hold the journal alone; when the block ends without an error, what was written is on disk.

        Raises:
            LedgerUnusable: the chain is broken, or the database fails.
        """
        with self._alone():  # also while the head is noted, or a slower writer could note an older one after it
            with self._store.writing() as transaction:
                pen = Pen(transaction, self._checked(transaction, self._noted_head()), self._key, self._clock)
                yield pen
            self._note_head(pen.entries)

    @contextmanager
    def reading(self) -> Generator[tuple[Transaction, tuple[Entry, ...]], None, None]:
        """See one state of the journal.

        Raises:
            LedgerUnusable: the chain is broken, or the database fails.
        """
        # Noted before the entries are read: a writer in between adds entries, and takes none away.
        noted = self._noted_head()
        with self._store.reading() as transaction:
            yield transaction, self._checked(transaction, noted)

    def set_budget(self, budget: Budget, reason: str) -> Entry:
        """Write a budget; it holds from now on, for every data set of the site.

        Raises:
            PrivacyError: the change is not allowed; see `check_change`.
        """
        with self.writing() as pen:
            booked = any(entry.kind == "reserve" for entry in pen.entries)
            check_change(stored_budget(pen.entries), budget, reason, booked)
            return pen.write("budget", budget_content(budget, reason.strip()))

    def close(self) -> None:
        """Release the database."""
        self._store.close()

    def _checked(self, transaction: Transaction, noted: str | None) -> tuple[Entry, ...]:
        entries = transaction.entries()
        fault = first_fault(entries, self._key.verifying, self._trusted)
        if fault is not None:
            raise LedgerUnusable(
                f"the ledger at {self._store.name} is not as it was written: {fault.text}. Nothing is booked on it; "
                "look with: cloister ledger verify, and restore a backup (the keys included)"
            )
        self._trusted = frozenset(entry.hash for entry in entries)
        if noted is not None and noted not in self._trusted:
            raise LedgerUnusable(
                f"the ledger at {self._store.name} lacks the entry {noted[:12]} that {self._head_file} notes: it "
                "was lost, cut, or set back to an older copy, and would forget what was spent since; restore the "
                "newest copy"
            )
        return entries

    def _noted_head(self) -> str | None:
        if self._head_file is None or not self._head_file.exists():
            return None
        return self._head_file.read_text(errors="replace").strip()

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Hold the lock beside the head's file, between threads and between processes."""
        if self._head_file is None:
            yield
            return
        try:
            lock = open_private(self._head_file.with_name(f"{self._head_file.name}.lock"), "a")
        except OSError as error:
            raise LedgerUnusable(f"{self._head_file}.lock cannot be opened: {error.strerror}; free the disk") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _note_head(self, entries: Sequence[Entry]) -> None:
        """Write the last entry's hash beside the keys, whole or not at all."""
        if self._head_file is None or not entries:
            return
        partial = self._head_file.with_name(f".{self._head_file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            with open_private(partial, "w") as stream:
                stream.write(entries[-1].hash + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(self._head_file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise LedgerUnusable(f"{self._head_file} cannot be written: {error.strerror}; free the disk") from error
