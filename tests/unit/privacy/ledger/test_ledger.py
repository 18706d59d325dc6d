"""What a site has spent: durable, never understated, replayed for free only when nothing new can leave."""

import logging
import sqlite3
from pathlib import Path

import pytest

from privacy.accounting import epsilon_of
from privacy.filter import RenyiFilter
from privacy.ledger import Budget, Reservation, admission
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import BudgetExceeded, PrivacyError, ReplayDiverged

STEP = SubsampledGaussian(0.05, 1.0, 10)
OTHER = SubsampledGaussian(0.05, 2.0, 10)
DELTA = 1e-5
COST = [epsilon_of([STEP] * count, DELTA) for count in range(5)]


def kinds(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        return [kind for (kind,) in connection.execute("SELECT kind FROM entries ORDER BY sequence")]


def test_a_reservation_counts_before_it_is_committed_and_nothing_is_ever_updated(open_ledger, booking, path) -> None:
    ledger = open_ledger()
    assert ledger.spent() == 0.0
    first = ledger.reserve(booking(1))
    assert ledger.spent() == first.epsilon_after == pytest.approx(COST[1])
    before = sqlite3.connect(path).execute("SELECT * FROM entries").fetchall()
    ledger.commit(first, "out")
    assert sqlite3.connect(path).execute("SELECT * FROM entries").fetchall()[: len(before)] == before
    assert ledger.spent() == pytest.approx(COST[1])
    assert ledger.reserve(booking(2)).epsilon_after == pytest.approx(COST[2])
    assert kinds(path) == ["budget", "schedule", "reserve", "commit", "reserve"]


def test_a_refusal_says_the_figures_and_the_rule_and_books_nothing(open_ledger, booking, path) -> None:
    budget = (COST[2] + COST[3]) / 2
    ledger = open_ledger(budget)
    ledger.reserve(booking(1))
    ledger.reserve(booking(2))
    before = kinds(path)
    with pytest.raises(
        BudgetExceeded,
        match=rf"round 3 would raise this site's ε from {COST[2]:.3f} to {COST[3]:.3f}, above its budget of "
        rf"{budget:g} at δ=1e-05 \(a schedule fixed in advance, composed exactly\); nothing was trained",
    ):
        ledger.reserve(booking(3))
    with pytest.raises(BudgetExceeded, match=r"the Rényi filter, because parameters may have been chosen after"):
        ledger.reserve(booking(1, run="second"))
    assert ledger.spent() == pytest.approx(COST[2])
    assert kinds(path) == before


def test_the_budget_may_be_spent_to_the_last_bit(open_ledger, booking) -> None:
    open_ledger(COST[4] * (1 - 1e-12)).reserve(booking(1, mechanism=STEP.repeated(40)))


@pytest.mark.parametrize("epsilon", [float("nan"), float("inf")])
def test_what_cannot_be_computed_is_refused(
    open_ledger, booking, path, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger()
    monkeypatch.setattr(admission, "epsilon_of", lambda mechanisms, delta: epsilon)
    with pytest.raises(BudgetExceeded):
        ledger.reserve(booking(1))
    assert kinds(path) == ["budget"]


def test_steps_without_noise_are_refused(open_ledger, booking) -> None:
    with pytest.raises(BudgetExceeded, match="to inf"):
        open_ledger(1e6).reserve(booking(1, mechanism=SubsampledGaussian(0.05, 0.0, 1)))


def filtered(*mechanisms: SubsampledGaussian, budget: float = 10.0) -> float:
    return RenyiFilter(budget, DELTA, mechanisms[0]).epsilon_of(list(mechanisms))


def test_one_run_as_declared_is_composed_exactly_and_anything_else_goes_through_the_filter(
    open_ledger, booking, path
) -> None:
    ledger = open_ledger()
    ledger.reserve(booking(1))
    assert ledger.reserve(booking(2)).epsilon_after == pytest.approx(COST[2])
    # Other noise than declared; then a second run, which also takes the exactness from the first.
    assert ledger.reserve(booking(3, mechanism=OTHER, schedule=STEP.repeated(40))).epsilon_after == pytest.approx(
        filtered(STEP, STEP, OTHER)
    )
    assert ledger.reserve(booking(1, run="second")).epsilon_after == pytest.approx(filtered(STEP, STEP, OTHER, STEP))
    assert ledger.spent("second") == pytest.approx(COST[1])
    assert ledger.spent("third") == 0.0
    assert ledger.spent() == pytest.approx(filtered(STEP, STEP, OTHER, STEP))
    assert ledger.spent() >= epsilon_of([STEP, STEP, OTHER, STEP], DELTA)
    assert ledger.mechanisms() == [STEP, STEP, OTHER, STEP]
    assert ledger.mechanisms("second") == [STEP]


def test_steps_beyond_the_schedule_go_through_the_filter(open_ledger, booking) -> None:
    ledger = open_ledger()
    short = STEP.repeated(20)
    ledger.reserve(booking(1, schedule=short))
    assert ledger.reserve(booking(2, schedule=short)).epsilon_after == pytest.approx(COST[2])
    assert ledger.reserve(booking(3, schedule=short)).epsilon_after == pytest.approx(filtered(STEP, STEP, STEP))


def test_a_schedule_declared_anew_is_a_change(open_ledger, booking, path) -> None:
    """Otherwise a run could always be declared as long as it already is."""
    ledger = open_ledger()
    ledger.reserve(booking(1, schedule=STEP.repeated(10)))
    after = ledger.reserve(booking(2, schedule=STEP.repeated(40))).epsilon_after
    assert after == pytest.approx(filtered(STEP, STEP))
    assert kinds(path).count("schedule") == 2


def test_the_order_of_the_filter_is_that_of_the_first_booking(open_ledger, booking, key, path) -> None:
    """An order chosen after looking at outputs would void the filter."""
    ledger = open_ledger(10.0)
    ledger.reserve(booking(1))
    lowered = open_ledger(6.0)
    assert lowered.reserve(booking(1, run="second")).epsilon_after == pytest.approx(filtered(STEP, STEP))
    assert filtered(STEP, STEP) != pytest.approx(filtered(STEP, STEP, budget=6.0), rel=1e-3)


def test_the_order_of_the_filter_suits_what_was_booked_first(open_ledger, booking) -> None:
    quiet = SubsampledGaussian(0.05, 8.0, 10)
    ledger = open_ledger(3.0)
    ledger.reserve(booking(1, mechanism=quiet))
    loud = STEP.repeated(2)
    after = ledger.reserve(booking(1, run="second", mechanism=loud)).epsilon_after
    assert after == pytest.approx(filtered(quiet, loud, budget=3.0))
    assert after != pytest.approx(filtered(loud, quiet, budget=3.0), rel=1e-3)


def test_a_budget_too_small_for_any_filter_still_admits_a_declared_run(open_ledger, booking) -> None:
    ledger = open_ledger(0.002)
    quiet = SubsampledGaussian(0.001, 100.0, 1)
    assert ledger.reserve(booking(1, mechanism=quiet)).epsilon_after < 0.002
    with pytest.raises(BudgetExceeded, match=r"to inf, above its budget of .*the Rényi filter"):
        ledger.reserve(booking(1, run="second", mechanism=quiet))


# -- replays


def test_the_same_inputs_again_are_a_replay_and_free(open_ledger, booking, path) -> None:
    ledger = open_ledger()
    first = ledger.reserve(booking(1))
    ledger.commit(first, "out")
    again = ledger.reserve(booking(1))
    assert again == Reservation(first.entry, first.epsilon_after, attempt=1, replayed=True, output_digest="out")
    ledger.commit(again, "out")
    assert ledger.spent() == pytest.approx(COST[1])
    assert kinds(path) == ["budget", "schedule", "reserve", "commit"]


def test_a_replay_after_a_crash_is_free_and_then_committed(open_ledger, booking, path) -> None:
    open_ledger().reserve(booking(1))
    ledger = open_ledger()
    again = ledger.reserve(booking(1))
    assert (again.replayed, again.output_digest, again.attempt) == (True, None, 1)
    ledger.commit(again, "out")
    assert ledger.reserve(booking(1)).output_digest == "out"
    assert ledger.spent() == pytest.approx(COST[1])


def test_a_replay_that_gives_another_output_must_not_leave(open_ledger, booking) -> None:
    ledger = open_ledger()
    ledger.commit(ledger.reserve(booking(1)), "out")
    again = ledger.reserve(booking(1))
    with pytest.raises(
        ReplayDiverged, match=r"attempt 1 of round 1 gave output other where it had given out: the same"
    ):
        ledger.commit(again, "other")
    fresh = ledger.reserve(booking(1), fresh=True)
    assert (fresh.attempt, fresh.replayed) == (2, False)
    assert fresh.epsilon_after == pytest.approx(COST[2])
    ledger.commit(fresh, "other")
    assert ledger.reserve(booking(1)).attempt == 2


def test_two_executions_of_one_attempt_cannot_both_commit_different_outputs(open_ledger, booking) -> None:
    ledger, twin = open_ledger(), open_ledger()
    first, second = ledger.reserve(booking(1)), twin.reserve(booking(1))
    ledger.commit(first, "out")
    with pytest.raises(ReplayDiverged):
        twin.commit(second, "other")


@pytest.mark.parametrize("changed", ["run", "round", "mechanism"])
def test_the_same_inputs_for_something_else_are_charged_and_never_share_a_noise_key(
    open_ledger, booking, changed: str
) -> None:
    """The noise key is made of inputs and attempt: two executions with one key would cancel each other's noise."""
    ledger = open_ledger()
    ledger.reserve(booking(1, inputs="same"))
    other = {
        "run": booking(1, run="second", inputs="same"),
        "round": booking(2, inputs="same"),
        "mechanism": booking(1, mechanism=OTHER, inputs="same"),
    }[changed]
    reservation = ledger.reserve(other)
    assert (reservation.attempt, reservation.replayed) == (2, False)
    assert len(ledger.mechanisms()) == 2


def test_only_a_reservation_can_be_committed(open_ledger) -> None:
    for entry in (1, 7, 0):
        with pytest.raises(PrivacyError, match=f"entry {entry} of the ledger is no reservation; reserve, then commit"):
            open_ledger().commit(Reservation(entry, 0.0, 1, False, None), "out")


# -- data sets


def test_the_same_data_under_another_name_has_the_same_spending(open_ledger, booking, people) -> None:
    open_ledger(data=people(0, 50)).reserve(booking(1))
    assert open_ledger(data=people(0, 50)).spent() == pytest.approx(COST[1])


def test_one_shared_unit_shares_the_spending_and_none_does_not(open_ledger, booking, people) -> None:
    open_ledger(data=people(0, 50)).reserve(booking(1))
    overlapping, apart = open_ledger(data=people(49, 90)), open_ledger(data=people(50, 90))
    assert overlapping.spent() == pytest.approx(COST[1])
    assert apart.spent() == 0.0
    assert apart.reserve(booking(1, run="second")).epsilon_after == pytest.approx(COST[1])
    # The one in the middle has units of both, neither of the others has.
    assert overlapping.spent() == pytest.approx(filtered(STEP, STEP))
    assert open_ledger(data=people(0, 50)).spent() == pytest.approx(COST[1])


# -- budgets


def test_the_smaller_budget_holds(open_ledger, booking, caplog: pytest.LogCaptureFixture) -> None:
    open_ledger(5.0)
    assert open_ledger(4.0).budget.epsilon == 4.0
    with caplog.at_level(logging.WARNING):
        assert open_ledger(6.0).budget.epsilon == 5.0
    assert "ε=6 has no effect, the ledger's is 5" in caplog.text
    assert "cloister ledger set-budget --epsilon 6 --reason WHY" in caplog.text


@pytest.mark.parametrize(("other", "text"), [({"delta": 1e-6}, "δ=1e-06 per record"), ({"unit": "user"}, "per user")])
def test_another_delta_or_unit_is_refused_with_the_command(open_ledger, other: dict[str, object], text: str) -> None:
    open_ledger(5.0)
    with pytest.raises(
        PrivacyError, match=f"the site file's budget is at .*{text}, the ledger's at δ=1e-05 per record.*"
    ):
        open_ledger(5.0, **other)
    with pytest.raises(PrivacyError, match="run: cloister ledger set-budget --epsilon 5 --delta"):
        open_ledger(5.0, **other)


@pytest.mark.parametrize("wrong", [(0.0, 1e-5), (float("inf"), 1e-5), (float("nan"), 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_what_is_no_budget(wrong: tuple[float, float]) -> None:
    with pytest.raises(PrivacyError, match="is no budget"):
        Budget(*wrong)
