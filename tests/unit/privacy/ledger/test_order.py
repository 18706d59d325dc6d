"""The filter's order is fixed by the first booking, whatever becomes of the budget."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from privacy.filter import RenyiFilter
from privacy.ledger import Booking, Budget, Ledger, SigningKey
from privacy.ledger.admission import filter_of
from privacy.ledger.chain import Entry, seal
from privacy.ledger.journal import Journal
from privacy.ledger.store import Snapshot, read_snapshot
from privacy.ledger.verification import verify
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import BudgetExceeded

FIRST = SubsampledGaussian(0.05, 1.0, 10)
QUIET = SubsampledGaussian(0.05, 8.0, 10)
ORDER = RenyiFilter(3.0, 1e-5, FIRST).order
OTHERS = [(3.0, 1e-3), (3.0, 1e-12), (30.0, 1e-8), (0.5, 1e-5)]

Open = Callable[..., Ledger]
Book = Callable[..., Booking]


def order(path: Path, budget: Budget) -> int:
    found = filter_of(budget, read_snapshot(path).entries)
    assert found is not None
    assert (found.epsilon, found.delta) == (budget.epsilon, budget.delta)
    return found.order


def set_budget(path: Path, key: SigningKey, epsilon: float, delta: float) -> Budget:
    journal = Journal(path, key)
    journal.set_budget(Budget(epsilon, delta), "a reason")
    journal.close()
    return Budget(epsilon, delta)


@pytest.mark.parametrize(("epsilon", "delta"), OTHERS)
def test_another_budget_moves_the_limit_and_not_the_order(
    open_ledger: Open, booking: Book, path: Path, key: SigningKey, epsilon: float, delta: float
) -> None:
    """Whoever may choose the order anew has seen outputs by then."""
    ledger = open_ledger(3.0)
    ledger.commit(ledger.reserve(booking(1)), "out")
    ledger.reserve(booking(1, run="second", mechanism=QUIET))
    ledger.close()
    budget = set_budget(path, key, epsilon, delta)
    assert RenyiFilter(epsilon, delta, FIRST).order != ORDER or delta == 1e-5
    assert order(path, budget) == ORDER
    later = open_ledger(epsilon, delta=delta)
    expected = RenyiFilter(3.0, 1e-5, FIRST).restated(epsilon, delta)
    assert later.spent() == pytest.approx(expected.epsilon_of([FIRST, QUIET]))
    try:
        after = later.reserve(booking(1, run="third", mechanism=QUIET)).epsilon_after
    except BudgetExceeded:
        assert expected.epsilon_of([FIRST, QUIET, QUIET]) > epsilon
    else:
        assert after == pytest.approx(expected.epsilon_of([FIRST, QUIET, QUIET]))
    assert order(path, budget) == ORDER, "also after something was booked at the new δ"
    assert order(path, set_budget(path, key, 3.0, 1e-5)) == ORDER, "and back"
    assert verify(read_snapshot(path), key.verifying).problems == ()


def test_a_budget_that_is_changed_before_anything_is_booked_decides(
    open_ledger: Open, booking: Book, path: Path, key: SigningKey
) -> None:
    open_ledger(3.0).close()
    budget = set_budget(path, key, 30.0, 1e-8)
    open_ledger(30.0, delta=1e-8).reserve(booking(1))
    assert order(path, budget) == RenyiFilter(30.0, 1e-8, FIRST).order != ORDER


def test_the_first_booking_counts_at_the_order_that_it_fixes(
    open_ledger: Open, booking: Book, path: Path, key: SigningKey
) -> None:
    """Other steps than the run declared, at once: admitted by the filter, whose order is that of all that follow."""
    after = open_ledger(3.0).reserve(booking(1, mechanism=QUIET, schedule=FIRST.repeated(40))).epsilon_after
    assert after == pytest.approx(RenyiFilter(3.0, 1e-5, QUIET).epsilon_of([QUIET]))
    assert after != pytest.approx(RenyiFilter(3.0, 1e-5).epsilon_of([QUIET]))
    assert verify(read_snapshot(path), key.verifying).problems == ()


def test_an_order_that_leaves_nothing_admits_nothing() -> None:
    kept = RenyiFilter(30.0, 1e-3, FIRST).restated(0.01, 1e-12)
    assert kept.limit < 0
    assert not kept.admits([QUIET])
    assert kept.epsilon_of([QUIET]) > 0.01


def _as_version(snapshot: Snapshot, key: SigningKey, version: int, stated: dict[int, float]) -> Snapshot:
    """Return the ledger as an earlier release wrote it, with what it stated."""
    chain: list[Entry] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("privacy.ledger.chain.SCHEMA_VERSION", version)
        for entry in snapshot.entries:
            figure = stated.get(entry.sequence)
            content = entry.content | ({} if figure is None else {"epsilon_after": figure})
            at = datetime.fromisoformat(entry.at).astimezone(UTC)
            chain.append(seal(key, chain[-1] if chain else None, entry.kind, at, entry.fingerprint, content))  # type: ignore[arg-type]
    return Snapshot(tuple(chain), snapshot.data_sets)


def test_figures_that_an_earlier_release_stated_at_its_own_order_hold(
    open_ledger: Open, booking: Book, path: Path, key: SigningKey
) -> None:
    ledger = open_ledger(3.0)
    ledger.reserve(booking(1))
    ledger.close()
    set_budget(path, key, 30.0, 1e-8)
    open_ledger(30.0, delta=1e-8).reserve(booking(1, run="second", mechanism=QUIET))
    snapshot = read_snapshot(path)
    assert snapshot.entries[-1].kind == "reserve"
    then = RenyiFilter(30.0, 1e-8, QUIET).epsilon_of([FIRST, QUIET])
    assert then != pytest.approx(snapshot.entries[-1].content["epsilon_after"], rel=0.05)
    stated = {snapshot.entries[-1].sequence: then}
    assert verify(_as_version(snapshot, key, 2, stated), key.verifying).problems == ()
    assert not verify(_as_version(snapshot, key, 3, stated), key.verifying).holds
