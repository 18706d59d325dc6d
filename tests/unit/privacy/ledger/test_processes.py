"""Real processes on one ledger: a crash is spent, and the last of a budget is spent once. SQLite and PostgreSQL."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from privacy.accounting import epsilon_of
from privacy.filter import RenyiFilter
from privacy.ledger import Budget, Ledger, SigningKey
from privacy.ledger.journal import Journal
from privacy.ledger.keys import load_or_create_keys
from privacy.ledger.store import Store
from privacy.ledger.verification import verify
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import BudgetExceeded

STEP = SubsampledGaussian(0.05, 1.0, 10)
DELTA = 1e-5
ROOT = Path(__file__).resolve().parents[4]

OPEN = """
import os, signal, sys
from pathlib import Path
from privacy.accounting import epsilon_of
from privacy.identity import identify
from privacy.ledger import Booking, Budget, Ledger, load_or_create_keys
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import BudgetExceeded

location, keys, epsilon, number = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
step = SubsampledGaussian(0.05, 1.0, 10)
people = identify((f"person {n}".encode() for n in range(50)), b"k" * 32)
booking = Booking("run", number, "plan", step.repeated(40), step, f"inputs {number}")
key = load_or_create_keys(keys).signing
epsilon_of([step], 1e-5)  # so that the processes meet in the ledger, not in the accountant
print("ready", flush=True)
sys.stdin.readline()
ledger = Ledger(location, key, people, Budget(epsilon, 1e-5))
"""
DIE = OPEN + "ledger.reserve(booking)\nos.kill(os.getpid(), signal.SIGKILL)\n"
TRY = (
    OPEN
    + """
try:
    print("booked", ledger.reserve(booking).entry)
except BudgetExceeded:
    print("refused")
"""
)


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, path: Path) -> str:
    return str(path) if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture
def site_key(tmp_path: Path) -> SigningKey:
    return load_or_create_keys(tmp_path / "keys").signing


def start(script: str, location: str, keys: Path, epsilon: float, number: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, location, str(keys), repr(epsilon), str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def release(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Let all go at the same moment, once all are ready; return what each says."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [process.communicate(timeout=600)[0].strip() for process in processes]


@pytest.mark.slow
def test_a_process_killed_after_reserving_has_spent(location, tmp_path, site_key, people) -> None:
    process = start(DIE, location, tmp_path / "keys", 10.0, 1)
    release([process])
    assert process.returncode == -signal.SIGKILL
    ledger = Ledger(location, site_key, people(), Budget(10.0, DELTA))
    assert ledger.spent() == pytest.approx(epsilon_of([STEP], DELTA))
    ledger.close()


@pytest.mark.slow
def test_processes_cannot_spend_the_last_of_it_twice(location, tmp_path, site_key) -> None:
    """Four open a new ledger at the same moment, and the budget holds two of them."""
    budget = (epsilon_of([STEP] * 2, DELTA) + epsilon_of([STEP] * 3, DELTA)) / 2
    said = release([start(TRY, location, tmp_path / "keys", budget, number) for number in range(1, 5)])
    assert sorted(word.split()[0] for word in said) == ["booked", "booked", "refused", "refused"]
    store = Store(location)
    found = verify(store.snapshot(), site_key.verifying)
    store.close()
    assert found.holds
    assert [figure.stated for figure in found.figures] == pytest.approx([epsilon_of([STEP] * n, DELTA) for n in (1, 2)])


def test_postgresql_keeps_the_same_ledger(postgres_url, site_key, people, booking) -> None:
    budget = Budget(10.0, DELTA)
    ledger = Ledger(postgres_url, site_key, people(), budget)
    first = ledger.reserve(booking(1))
    ledger.commit(first, "out")
    assert ledger.reserve(booking(1)).output_digest == "out"
    overlapping = Ledger(postgres_url.replace("postgresql:", "postgresql+psycopg:"), site_key, people(49, 60), budget)
    assert overlapping.spent() == ledger.spent() == pytest.approx(epsilon_of([STEP], DELTA))
    after = overlapping.reserve(booking(1, run="second")).epsilon_after
    assert after == pytest.approx(RenyiFilter(10.0, DELTA).epsilon_of([STEP, STEP]))
    journal = Journal(postgres_url, site_key)
    journal.set_budget(Budget(0.1, DELTA), "")
    with pytest.raises(BudgetExceeded):
        ledger.reserve(booking(2))
    journal.close()
    store = Store(postgres_url, read_only=True)
    snapshot = store.snapshot()
    assert verify(snapshot, site_key.verifying).holds
    assert [entry.kind for entry in snapshot.entries] == [
        *("budget", "schedule", "reserve", "commit", "schedule", "reserve", "budget")
    ]
    for opened in (ledger, overlapping, store):
        opened.close()


def test_reading_and_checking_are_one_transaction(open_ledger, booking, path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one process computes whether there is room, nobody else can book; looking is allowed."""
    import sqlite3

    from privacy.ledger import admission

    ledger = open_ledger()
    seen: list[str] = []

    def meanwhile(mechanisms: list[SubsampledGaussian], delta: float) -> float:
        other = sqlite3.connect(path, timeout=0)
        try:
            seen.append(f"{other.execute('SELECT count(*) FROM entries').fetchone()[0]} entry")
            other.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            seen.append(str(error))
        finally:
            other.close()
        return epsilon_of(mechanisms, delta)

    monkeypatch.setattr(admission, "epsilon_of", meanwhile)
    ledger.reserve(booking(1))
    assert seen == ["1 entry", "database is locked"]
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
