"""What a site has spent: durable, never understated, and shared by every process that trains on its records."""

import multiprocessing
import os
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import pytest

from privacy import ledger as ledger_module
from privacy.accounting import epsilon_of
from privacy.ledger import Budget, Ledger
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import BudgetExceeded

STEP = SubsampledGaussian(0.05, 1.0, 10)
DELTA = 1e-5
COST = [epsilon_of([STEP] * count, DELTA) for count in range(4)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


def states(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM entries ORDER BY id")]


def test_a_reservation_counts_before_it_is_committed(path: Path) -> None:
    ledger = Ledger(path, Budget(10.0, DELTA))
    assert ledger.spent() == 0.0
    reservation = ledger.reserve("run", 1, STEP)
    assert ledger.spent() == reservation.epsilon_after == pytest.approx(COST[1])
    assert states(path) == ["reserved"]
    ledger.commit(reservation)
    assert ledger.spent() == pytest.approx(COST[1])
    assert states(path) == ["committed"]
    assert ledger.reserve("run", 2, STEP).epsilon_after == pytest.approx(COST[2])
    assert states(path) == ["committed", "reserved"]
    ledger.close()


def test_a_refusal_says_the_figures_and_books_nothing(path: Path) -> None:
    budget = (COST[2] + COST[3]) / 2
    ledger = Ledger(path, Budget(budget, DELTA))
    ledger.reserve("run", 1, STEP)
    ledger.reserve("run", 2, STEP)
    with pytest.raises(
        BudgetExceeded,
        match=rf"round 3 would raise this site's ε from {COST[2]:.3f} to {COST[3]:.3f}, above its budget of "
        rf"{budget:g} at δ=1e-05; nothing was trained",
    ):
        ledger.reserve("run", 3, STEP)
    assert ledger.spent() == pytest.approx(COST[2])
    assert len(states(path)) == 2
    assert ledger.reserve("run", 4, SubsampledGaussian(0.05, 5.0, 1)).epsilon_after <= budget
    ledger.close()


def test_the_budget_may_be_spent_to_the_last_bit(path: Path) -> None:
    ledger = Ledger(path, Budget(COST[1] * (1 - 1e-12), DELTA))
    ledger.reserve("run", 1, STEP)
    ledger.close()


@pytest.mark.parametrize("epsilon", [float("nan"), float("inf")])
def test_what_cannot_be_computed_is_refused(path: Path, epsilon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(path, Budget(10.0, DELTA))
    monkeypatch.setattr(ledger_module, "epsilon_of", lambda mechanisms, delta: epsilon)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("run", 1, STEP)
    assert states(path) == []
    ledger.close()


def test_steps_without_noise_are_refused(path: Path) -> None:
    ledger = Ledger(path, Budget(1e6, DELTA))
    with pytest.raises(BudgetExceeded, match="to inf"):
        ledger.reserve("run", 1, SubsampledGaussian(0.05, 0.0, 1))
    ledger.close()


def test_entries_survive_the_process(path: Path) -> None:
    first = Ledger(path, Budget(10.0, DELTA), clock=lambda: datetime(2030, 1, 2, tzinfo=UTC))
    first.commit(first.reserve("run", 1, STEP))
    first.close()
    second = Ledger(path, Budget(10.0, DELTA))
    assert second.mechanisms() == [STEP]
    assert second.spent() == pytest.approx(COST[1])
    second.close()
    with sqlite3.connect(path) as connection:
        row = connection.execute(
            "SELECT at, run, round, sampling_rate, noise_multiplier, steps FROM entries"
        ).fetchone()
    assert row == ("2030-01-02T00:00:00+00:00", "run", 1, 0.05, 1.0, 10)


def test_runs_are_told_apart_and_composed(path: Path) -> None:
    ledger = Ledger(path, Budget(10.0, DELTA))
    other = SubsampledGaussian(0.1, 2.0, 5)
    ledger.reserve("first", 1, STEP)
    ledger.reserve("second", 1, other)
    ledger.reserve("first", 2, STEP)
    assert ledger.mechanisms() == [STEP, other, STEP]
    assert ledger.mechanisms("first") == [STEP, STEP]
    assert ledger.spent("first") == pytest.approx(COST[2])
    assert ledger.spent("second") == pytest.approx(epsilon_of([other], DELTA))
    assert ledger.spent("third") == 0.0
    assert ledger.spent() == pytest.approx(epsilon_of([STEP, STEP, other], DELTA))
    assert max(ledger.spent("first"), ledger.spent("second")) < ledger.spent() < 10
    ledger.close()


def reserve_then_die(path: Path) -> None:
    Ledger(path, Budget(10.0, DELTA)).reserve("run", 1, STEP)
    os._exit(9)  # as a power cut would: nothing is closed, flushed or committed


def test_a_crash_after_reserving_counts_as_spent(path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=reserve_then_die, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    ledger = Ledger(path, Budget(10.0, DELTA))
    assert ledger.spent() == pytest.approx(COST[1])
    assert states(path) == ["reserved"]
    ledger.close()


def reserve_when_told(path: Path, budget: float, gate: object, outcomes: object) -> None:
    COST  # noqa: B018 - importing this module has warmed the accountant's caches
    gate.wait(60)  # type: ignore[attr-defined]
    try:
        ledger = Ledger(path, Budget(budget, DELTA))
        ledger.reserve("run", os.getpid(), STEP)
        outcomes.put("booked")  # type: ignore[attr-defined]
    except BudgetExceeded:
        outcomes.put("refused")  # type: ignore[attr-defined]


@pytest.mark.slow
def test_two_processes_cannot_both_spend_the_last_of_it(path: Path) -> None:
    """Both open a new file at the same moment, and the budget holds one of them."""
    context = multiprocessing.get_context("spawn")
    gate, outcomes = context.Barrier(2), context.Queue()
    budget = (COST[1] + COST[2]) / 2
    processes = [context.Process(target=reserve_when_told, args=(path, budget, gate, outcomes)) for _ in range(2)]
    for process in processes:
        process.start()
    seen = sorted(outcomes.get(timeout=90) for _ in processes)
    for process in processes:
        process.join(60)
    assert seen == ["booked", "refused"]
    assert states(path) == ["reserved"]


def test_reading_and_checking_are_one_transaction(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one process computes whether there is room, nobody else can book."""
    ledger = Ledger(path, Budget(10.0, DELTA))
    seen: list[str] = []

    def meanwhile(mechanisms: list[SubsampledGaussian], delta: float) -> float:
        other = sqlite3.connect(path, timeout=0)
        try:
            other.execute("BEGIN IMMEDIATE")
            seen.append("entered")
        except sqlite3.OperationalError as error:
            seen.append(str(error))
        finally:
            other.close()
        return epsilon_of(mechanisms, delta)

    monkeypatch.setattr(ledger_module, "epsilon_of", meanwhile)
    ledger.reserve("run", 1, STEP)
    assert seen == ["database is locked"]
    ledger.close()
