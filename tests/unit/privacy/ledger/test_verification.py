"""Tampering: whatever is changed, the first changed, missing or moved entry is named."""

import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

from privacy.accounting import epsilon_of as true
from privacy.filter import RenyiFilter
from privacy.ledger import SigningKey
from privacy.ledger.chain import SCHEMA_VERSION, Entry, first_fault, seal
from privacy.ledger.recompute import Recomputation, renyi_cost
from privacy.ledger.store import Snapshot, read_snapshot
from privacy.ledger.summary import summarize
from privacy.ledger.verification import verify
from privacy.mechanisms import SubsampledGaussian, Truncation
from privacy.renyi import order_costs

STEP = SubsampledGaussian(0.05, 1.0, 10)


@pytest.fixture
def kept(open_ledger, booking, people, path) -> Path:
    """Entries: 1 budget, 2 schedule, 3 reserve, 4 commit, 5 reserve, 6 commit, 7 schedule, 8 reserve."""
    ledger = open_ledger()
    for number in (1, 2):
        ledger.commit(ledger.reserve(booking(number)), f"out {number}")
    open_ledger(data=people(40, 60)).reserve(booking(1, run="second"))
    return path


def first_problem(path: Path, key: SigningKey, statement: str, *parameters: object) -> str:
    with sqlite3.connect(path) as connection:
        connection.execute(statement, parameters)
    found = verify(read_snapshot(path), key.verifying)
    assert not found.holds
    return found.problems[0].text


def test_an_untouched_ledger_holds_and_every_figure_is_recomputed(kept, key) -> None:
    found = verify(read_snapshot(kept), key.verifying)
    assert found.problems == ()
    assert found.entries == 8
    assert [(figure.sequence, figure.rule) for figure in found.figures] == [
        (3, "schedule"),
        (5, "schedule"),
        (8, "filter"),
    ]
    for figure in found.figures:
        assert figure.recomputed == pytest.approx(figure.stated, rel=2e-3)
        assert figure.stated_rule == figure.rule
    for figure in found.figures[:2]:
        assert figure.at_most is not None
        assert figure.at_least <= figure.stated <= figure.at_most
        assert figure.at_least == pytest.approx(figure.stated, rel=2e-3)
    filtered = found.figures[2]
    assert filtered.at_most is None
    assert filtered.at_least == pytest.approx(filtered.stated, rel=1e-6)


@pytest.mark.parametrize(
    "mechanism",
    [
        SubsampledGaussian(0.05, 1.0, 10, Truncation(200, 20)),
        SubsampledGaussian(0.05, 1.0, 10, discrete=True),
        SubsampledGaussian(1.0, 4.0, 1),
    ],
    ids=["cut", "discrete", "one Gaussian"],
)
def test_every_kind_of_mechanism_can_be_recomputed(open_ledger, booking, path, key, mechanism) -> None:
    open_ledger().reserve(booking(1, mechanism=mechanism))
    assert verify(read_snapshot(path), key.verifying).problems == ()


@pytest.mark.parametrize("column", [name for name in Entry.__dataclass_fields__ if name != "sequence"])
def test_an_entry_altered_in_any_column_is_named(kept, key, column: str) -> None:
    value = {"schema_version": 1, "previous": "f" * 64, "hash": "f" * 64, "signature": "0" * 128}.get(column, "x")
    text = first_problem(kept, key, f"UPDATE entries SET {column} = ? WHERE sequence = 5", value)
    assert "entry 5" in text


def test_an_altered_number_is_named_even_if_its_hash_is_mended(kept, key) -> None:
    """Whoever mends the hash cannot mend the signature."""
    entry = read_snapshot(kept).entries[4]
    forged = replace(entry, payload=entry.payload.replace('"steps":10', '"steps":1'))
    assert forged.payload != entry.payload
    statement = "UPDATE entries SET payload = ?, hash = ? WHERE sequence = 5"
    text = first_problem(kept, key, statement, forged.payload, forged.expected_hash)
    assert text == "the signature of entry 5 is not the site's: it was forged or damaged"


@pytest.mark.parametrize(("deleted", "named"), [(1, 1), (5, 5), (7, 7)])
def test_a_removed_entry_is_named(kept, key, deleted: int, named: int) -> None:
    text = first_problem(kept, key, "DELETE FROM entries WHERE sequence = ?", deleted)
    assert text == f"entry {named} is missing: entry {named + 1} stands in its place"


def test_a_removed_entry_is_noticed_when_the_gap_is_closed(kept, key) -> None:
    with sqlite3.connect(kept) as connection:
        connection.execute("DELETE FROM entries WHERE sequence = 5")
    text = first_problem(kept, key, "UPDATE entries SET sequence = sequence - 1 WHERE sequence > 5")
    assert text == "entry 5 was written as entry 6: entries were moved, removed or inserted"


def test_entries_that_changed_places_are_named(kept, key) -> None:
    with sqlite3.connect(kept) as connection:
        for old, new in ((4, 100), (6, 4), (100, 6)):
            connection.execute("UPDATE entries SET sequence = ? WHERE sequence = ?", (new, old))
    assert (
        first_problem(kept, key, "SELECT 1")
        == "entry 4 was written as entry 6: entries were moved, removed or inserted"
    )


def test_an_inserted_entry_is_named(kept, key) -> None:
    """Also one with a true signature, such as a copy from another ledger of the same site."""
    entries = read_snapshot(kept).entries
    content = entries[3].content | {"output_digest": "another"}
    copied = seal(key, entries[2], "commit", _date(entries[0]), entries[2].fingerprint, content)
    with sqlite3.connect(kept) as connection:
        connection.execute("DELETE FROM entries WHERE sequence = 4")
        values = tuple(copied.__dict__[name] for name in Entry.__dataclass_fields__)
        connection.execute(f"INSERT INTO entries VALUES ({','.join('?' * len(values))})", values)
    assert first_problem(kept, key, "SELECT 1").startswith("entry 5 does not follow what stands before it")


def test_a_ledger_written_anew_with_another_key_is_refused(kept, key) -> None:
    other, chain = SigningKey.generate(), []
    for entry in read_snapshot(kept).entries:
        chain.append(
            seal(other, chain[-1] if chain else None, entry.kind, _date(entry), entry.fingerprint, entry.content)  # type: ignore[arg-type]
        )
    assert first_fault(chain, other.verifying) is None
    fault = first_fault(chain, key.verifying)
    assert fault is not None
    assert fault.text == f"entry 1 names key {other.key_id}, which is not the site's {key.key_id}"
    pretended = [replace(entry, key_id=key.key_id) for entry in chain]
    pretended = [replace(pretended[0], hash=pretended[0].expected_hash)]
    fault = first_fault(pretended, key.verifying)
    assert fault is not None
    assert "signature of entry 1" in fault.text


def test_a_version_of_the_future_is_not_guessed_at(key, kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.ledger.chain.READABLE_VERSIONS", (1, SCHEMA_VERSION + 1))
    problem = verify(read_snapshot(kept), key.verifying).problems[0].text
    assert problem.startswith(
        f"entry 1 has schema version {SCHEMA_VERSION}, this release reads 1 and {SCHEMA_VERSION + 1}; install"
    )


def test_a_cut_tail_shows_against_a_noted_head(kept, key, tmp_path) -> None:
    head = read_snapshot(kept).entries[-1].hash
    shutil.copy(kept, tmp_path / "copy.db")
    with sqlite3.connect(kept) as connection:
        connection.execute("DELETE FROM entries WHERE sequence > 5")
        connection.execute("DELETE FROM data_sets WHERE fingerprint NOT IN (SELECT fingerprint FROM entries)")
    assert verify(read_snapshot(kept), key.verifying).holds  # what the documentation says cannot be noticed
    problem = verify(read_snapshot(kept), key.verifying, head=head[:12]).problems[0].text
    assert problem.startswith(f"no entry has the hash {head[:12]} that was noted: entries were cut off at the end")
    assert verify(read_snapshot(tmp_path / "copy.db"), key.verifying, head=head).holds


def test_a_cut_tail_shows_by_the_data_set_it_leaves_behind(kept, key) -> None:
    text = first_problem(kept, key, "DELETE FROM entries WHERE sequence > 6")
    assert "the entries that used it were cut off" in text


def test_units_cannot_be_taken_out_of_a_data_set(kept, key) -> None:
    """Without them another data set with the same people would look unspent."""
    second = read_snapshot(kept).entries[7].fingerprint
    with sqlite3.connect(kept) as connection:
        connection.execute("UPDATE data_sets SET units = substr(units, 17) WHERE fingerprint = ?", (second,))
    assert first_problem(kept, key, "SELECT 1").startswith(f"the units of data set {second[:12]} were altered")
    text = first_problem(kept, key, "DELETE FROM data_sets WHERE fingerprint = ?", second)
    assert text == f"the data set {second[:12]} of entry 7 is missing"


def _date(entry: Entry):
    from datetime import datetime

    return datetime.fromisoformat(entry.at)


def rewritten(snapshot: Snapshot, key: SigningKey, number: int, **changes: object) -> Snapshot:
    """Return the ledger as the key's holder would write it with other content in one entry."""
    chain: list[Entry] = []
    for entry in snapshot.entries:
        content = entry.content | (changes if entry.sequence == number else {})
        last = chain[-1] if chain else None
        chain.append(seal(key, last, entry.kind, _date(entry), entry.fingerprint, content))  # type: ignore[arg-type]
    return Snapshot(tuple(chain), snapshot.data_sets)


def test_a_wrong_figure_is_found_though_the_site_signed_it(kept, key) -> None:
    snapshot = read_snapshot(kept)
    for number, stated in ((5, 0.5), (5, 9.0), (8, 0.5)):
        problem = verify(rewritten(snapshot, key, number, epsilon_after=stated), key.verifying).problems[0]
        assert problem.sequence == number
        assert f"states ε={stated:.4f}, but what is booked comes to" in problem.text


def test_a_faulty_accountant_is_found_by_the_others(kept, key, monkeypatch: pytest.MonkeyPatch) -> None:
    from privacy.ledger import admission

    snapshot = read_snapshot(kept)
    truth = [entry.content.get("epsilon_after") for entry in snapshot.entries]
    for factor, text in ((0.5, "but the true value is at least"), (2.0, "that Rényi DP guarantees")):
        monkeypatch.setattr(admission, "epsilon_of", lambda mechanisms, delta, f=factor: f * true(mechanisms, delta))
        wrong = rewritten(snapshot, key, 5, epsilon_after=factor * truth[4])
        assert any(text in problem.text for problem in verify(wrong, key.verifying).problems)


def test_a_faulty_filter_is_found_by_integration(kept, key, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RenyiFilter.epsilon_of
    monkeypatch.setattr(RenyiFilter, "epsilon_of", lambda self, mechanisms: 0.9 * real(self, mechanisms))
    snapshot = read_snapshot(kept)
    wrong = rewritten(snapshot, key, 8, epsilon_after=0.9 * snapshot.entries[7].content["epsilon_after"])
    assert "but the true value is at least" in verify(wrong, key.verifying).problems[0].text


def test_a_rule_that_does_not_apply_is_found_though_the_site_signed_it(kept, key) -> None:
    for number, stated, asked in ((5, "filter", "schedule"), (8, "schedule", "filter")):
        problem = verify(rewritten(read_snapshot(kept), key, number, rule=stated), key.verifying).problems[0]
        assert problem.text == (
            f"entry {number} was admitted by the rule '{stated}', but what is booked asks for '{asked}'"
        )


def test_an_admission_beyond_the_budget_is_found(kept, key) -> None:
    snapshot = read_snapshot(kept)
    lower = rewritten(snapshot, key, 1, epsilon=0.2)
    problems = [problem.text for problem in verify(lower, key.verifying).problems]
    assert "entry 3 was admitted under a budget that was not in force" in problems
    low = {"epsilon": 0.2, "delta": 1e-5, "unit": "record"}
    problems = [problem.text for problem in verify(rewritten(snapshot, key, 3, budget=low), key.verifying).problems]
    assert any(text.startswith("entry 3 was admitted at ε=") and "above the budget of 0.2" in text for text in problems)


def test_commits_are_checked(kept, key) -> None:
    snapshot = read_snapshot(kept)
    again = verify(rewritten(snapshot, key, 6, reserve=3), key.verifying).problems[0].text
    assert again == "entry 6 commits entry 3 again, after entry 4"
    nothing = verify(rewritten(snapshot, key, 6, reserve=2), key.verifying).problems[0].text
    assert nothing == "entry 6 commits entry 2, which is no reservation"


def test_the_summary_says_who_spent_what(kept) -> None:
    summary = summarize(read_snapshot(kept))
    first, second = summary.data_sets
    assert first.shares_units_with == (second.fingerprint,)
    assert [(run.run, run.reservations, run.uncommitted, run.steps) for run in first.runs] == [
        ("run", 2, 0, 20),
        ("second", 1, 1, 10),
    ]
    assert first.spent == second.spent
    assert first.spent.rule == "filter"
    assert first.left == pytest.approx(10 - first.spent.epsilon)
    assert [point.sequence for point in first.points] == [3, 5]


BOOKED = [
    (SubsampledGaussian(0.02, 1.0, 40), 2e-3),
    (SubsampledGaussian(0.01, 0.6, 40), 5e-3),
    (SubsampledGaussian(1.0, 4.0, 1), 1e-3),
    (SubsampledGaussian(0.02, 1.0, 40, Truncation(1000, 60)), 2e-3),
]


@pytest.mark.parametrize(("mechanism", "apart"), BOOKED, ids=["usual", "loud", "Gaussian", "seldom cut"])
def test_the_bounds_enclose_the_accountant_and_are_close(mechanism: SubsampledGaussian, apart: float) -> None:
    again, history = Recomputation([mechanism]), [mechanism]
    for _ in range(6):
        stated = true(history, 1e-5)
        at_most = again.at_most(history, 1e-5)
        assert at_most is not None
        assert at_most == pytest.approx(stated, rel=2e-3)
        assert (1 - apart) * stated <= again.at_least(history, 1e-5) <= min(stated, at_most)
        history = [*history, mechanism]


def test_the_lower_bound_of_one_gaussian_is_below_the_exact_value() -> None:
    """One Gaussian has a closed form; the merged intervals come to within a thousandth of it."""
    for noise in (0.5, 1.0, 5.0):
        exact = get_epsilon_gaussian(noise, 1e-5)
        step = SubsampledGaussian(1.0, noise, 1)
        assert 0.999 * exact <= Recomputation([step]).at_least([step], 1e-5) <= exact


def test_the_order_of_a_history_and_what_was_asked_before_change_no_bound() -> None:
    other = SubsampledGaussian(0.05, 2.0, 10)
    grown = Recomputation([STEP, other])
    for history in ([STEP], [STEP, other], [STEP, other, STEP]):
        grown.at_least(history, 1e-5)
    fresh = Recomputation([STEP, other])
    assert grown.at_least([STEP, other, STEP], 1e-5) == pytest.approx(fresh.at_least([other, STEP, STEP], 1e-5))


def test_bounds_of_nothing_of_no_noise_and_of_what_the_library_does_not_have() -> None:
    none = SubsampledGaussian(0.1, 0.0, 1)
    assert Recomputation([]).at_least([], 1e-5) == Recomputation([]).at_most([], 1e-5) == 0.0
    assert Recomputation([none]).at_least([none], 1e-5) == float("inf")
    assert Recomputation([none]).at_most([none], 1e-5) is None
    for other in (replace(STEP, discrete=True), replace(STEP, truncation=Truncation(200, 12))):
        assert Recomputation([other]).at_most([other], 1e-5) is None


@pytest.mark.parametrize("rate", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("order", [2, 7, 40])
def test_a_renyi_cost_by_integration(rate: float, order: int) -> None:
    for noise in (0.7, 1.5, 6.0):
        step = SubsampledGaussian(rate, noise, 3)
        assert renyi_cost([step], order) == pytest.approx(order_costs([step], [order])[0], rel=1e-9)
    assert renyi_cost([SubsampledGaussian(1.0, 2.0, 1)], order) == pytest.approx(order / 8)
    assert renyi_cost([SubsampledGaussian(0.1, 0.0, 1)], order) == float("inf")
