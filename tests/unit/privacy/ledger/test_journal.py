"""Budgets as entries, and a ledger that was tampered with, or is something else."""

import math
import sqlite3
import sys
import threading
from pathlib import Path

import pytest

from privacy.ledger import Budget, SigningKey
from privacy.ledger.journal import Journal
from privacy.ledger.store import Store
from protocol.errors import BudgetExceeded, PrivacyError


@pytest.fixture
def journal(path: Path, key: SigningKey):
    opened = Journal(path, key)
    yield opened
    opened.close()


def test_lowering_takes_effect_at_once_also_for_a_ledger_that_is_open(journal, open_ledger, booking) -> None:
    ledger = open_ledger(10.0)
    ledger.reserve(booking(1))
    journal.set_budget(Budget(0.1, 1e-5), "")
    assert ledger.budget.epsilon == 0.1
    with pytest.raises(BudgetExceeded, match=r"above its budget of 0\.1"):
        ledger.reserve(booking(2))


def test_what_was_reserved_before_a_budget_was_lowered_does_not_leave_above_it(journal, open_ledger, booking) -> None:
    """A crash left round 2 uncommitted; round 1 has left, and may leave again."""
    ledger = open_ledger(10.0)
    ledger.commit(ledger.reserve(booking(1)), "first")
    spent = ledger.reserve(booking(2)).epsilon_after
    assert ledger.reserve(booking(2)).replayed
    journal.set_budget(Budget(spent * 0.99, 1e-5), "")
    with pytest.raises(BudgetExceeded, match=r"round 2 would raise this site's ε from"):
        ledger.reserve(booking(2))
    assert ledger.reserve(booking(1)).output_digest == "first"


def test_an_account_states_no_more_than_was_admitted_and_no_less_at_a_smaller_delta(
    journal, open_ledger, booking, people
) -> None:
    ledger = open_ledger(2.0, delta=1e-3)
    ledger.reserve(booking(1))
    assert ledger.account("run").admitted == 2.0
    journal.set_budget(Budget(1.5, 1e-7), "")
    account = open_ledger(1.5, delta=1e-7).account("run")
    assert account.budget.delta == 1e-7
    assert account.admitted == math.inf, "what 2.0 bounds at δ=1e-3, it does not at 1e-7"


def test_raising_needs_a_reason_and_the_file(journal, open_ledger) -> None:
    journal.set_budget(Budget(1.0, 1e-5), "")
    for higher in (Budget(2.0, 1e-5), Budget(1.0, 1e-4)):
        with pytest.raises(
            PrivacyError, match=r"raising the budget from ε=1, δ=1e-05 to .* needs a reason.*--reason WHY"
        ):
            journal.set_budget(higher, "  ")
    entry = journal.set_budget(Budget(2.0, 1e-5), "ethics board, 3 May")
    assert entry.content["reason"] == "ethics board, 3 May"
    assert open_ledger(1.5).budget.epsilon == 1.5
    assert open_ledger(2.0).budget.epsilon == 2.0


def test_the_unit_is_fixed_once_something_is_booked(journal, open_ledger, booking) -> None:
    journal.set_budget(Budget(10.0, 1e-5, "user"), "")
    journal.set_budget(Budget(10.0, 1e-5, "record"), "")
    open_ledger(10.0).reserve(booking(1))
    with pytest.raises(PrivacyError, match="was counted per record and says nothing per user; keep --unit record"):
        journal.set_budget(Budget(10.0, 1e-5, "user"), "because")


def test_nothing_is_booked_on_a_broken_chain(open_ledger, booking, path) -> None:
    ledger = open_ledger()
    ledger.reserve(booking(1))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE entries SET payload = replace(payload, '\"steps\":10', '\"steps\":1')")
    for act in (ledger.spent, lambda: ledger.reserve(booking(2)), open_ledger):
        with pytest.raises(
            PrivacyError, match=r"is not as it was written: entry 3 was altered.*cloister ledger verify"
        ):
            act()


def test_another_key_cannot_go_on(open_ledger, people, path) -> None:
    open_ledger()
    with pytest.raises(PrivacyError, match=r"entry 1 names key .* which is not the site's"):
        Journal(path, SigningKey.generate()).set_budget(Budget(1.0, 1e-5), "")


def test_a_database_with_another_layout_is_not_read_as_empty(path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE entries (id INTEGER PRIMARY KEY, state TEXT)")
    with pytest.raises(PrivacyError, match=r"the table entries at .* has another layout"):
        Store(path)


def test_what_is_no_ledger_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.db").write_text("no database " * 100)
    sqlite3.connect(tmp_path / "empty.db").close()
    with pytest.raises(PrivacyError, match=r"the ledger at .*text.db cannot be opened: file is not a database"):
        Store(tmp_path / "text.db")
    for missing in ("none.db", "empty.db"):
        with pytest.raises(
            PrivacyError, match=f"there is no ledger at .*{missing}; make one with: cloister ledger init"
        ):
            Store(tmp_path / missing, read_only=True)
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(PrivacyError, match="a ledger cannot be kept in 'mysql'; use a path, or postgresql"):
        Store("mysql://host/database")
    with pytest.raises(PrivacyError, match="the ledger's URL cannot be read"):
        Store("://")
    with pytest.raises(PrivacyError, match=r"the ledger at postgresql\+psycopg://me:\*\*\*@/x.* cannot be opened"):
        Store(f"postgresql://me:hunter2@/x?host={tmp_path}")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(PrivacyError, match=r"needs its driver; run: pip install 'cloister\[postgres\]'"):
        Store("postgresql://host/database")


def test_a_ledger_that_was_lost_or_set_back_is_noticed(tmp_path: Path) -> None:
    """Else deleting one file would give the whole budget back."""
    location, head = tmp_path / "ledger.db", tmp_path / "ledger.head"
    key = SigningKey.generate()
    journal = Journal(location, key, head_file=head)
    journal.set_budget(Budget(1.0, 1e-5), "")
    journal.close()
    older = location.read_bytes()
    journal = Journal(location, key, head_file=head)
    journal.set_budget(Budget(0.5, 1e-5), "")
    journal.close()
    for content in (older, b""):
        location.write_bytes(content)
        journal = Journal(location, key, head_file=head)
        with pytest.raises(PrivacyError, match=r"lacks the entry .* lost, cut, or set back to an older copy"):
            journal.set_budget(Budget(0.4, 1e-5), "")
        journal.close()


def test_a_reader_is_not_misled_by_a_writer_beside_it(path, key, tmp_path) -> None:
    head = tmp_path / "ledger.head"
    writer = Journal(path, key, head_file=head)
    writer.set_budget(Budget(1.0, 1e-5), "")

    class Interrupted(Journal):
        def _noted_head(self) -> str | None:
            writer.set_budget(Budget(0.5, 1e-5), "")
            return super()._noted_head()

    reader = Interrupted(path, key, head_file=head)
    with reader.reading() as (_, entries):
        assert len(entries) == 2
    for each in (reader, writer):
        each.close()


def test_the_head_is_noted_before_another_writer_may_write(path, key, tmp_path) -> None:
    """Otherwise the slower of two could note an older head last, and a ledger set back to it would pass."""
    head, slow, entered, go = tmp_path / "ledger.head", [True], threading.Event(), threading.Event()

    class Slow(Journal):
        def _note_head(self, entries) -> None:
            if slow:
                slow.clear()
                entered.set()
                go.wait(600)
            super()._note_head(entries)

    journals = [Slow(path, key, head_file=head) for _ in range(2)]
    writers = [threading.Thread(target=each.set_budget, args=(Budget(1.0, 1e-5), "")) for each in journals]
    writers[0].start()
    assert entered.wait(600)
    writers[1].start()
    writers[1].join(0.3)  # nothing may come meanwhile
    with journals[0].reading() as (_, entries):
        assert len(entries) == 1, "the second waits, although the first has committed"
    go.set()
    for writer in writers:
        writer.join(600)
    with journals[0].reading() as (_, entries):
        assert [head.read_text().strip()] == [entries[-1].hash]
        assert len(entries) == 2
    for each in journals:
        each.close()
