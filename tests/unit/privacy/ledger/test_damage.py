"""Whatever happened to the file: a verdict or one of Cloister's errors, and never "it holds" for other facts."""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy.identity import DataIdentity, identify
from privacy.ledger import Booking, Budget, Ledger, SigningKey
from privacy.ledger.chain import SCHEMA_VERSION, Entry, seal
from privacy.ledger.journal import Journal
from privacy.ledger.store import Snapshot, read_snapshot
from privacy.ledger.verification import structural_problems, verify
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import CloisterError, PrivacyError

STEP = SubsampledGaussian(0.05, 1.0, 10)
RECORDED = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, key: SigningKey) -> Path:
    """A closed ledger with two data sets, one of them with marks."""
    path = tmp_path_factory.mktemp("whole") / "ledger.db"
    people = [f"person {number}".encode() for number in range(60)]
    for data, run in ((identify(people[:40], b"k" * 32), "a"), (identify(people[30:], b"k" * 32, [b"x", b"y"]), "b")):
        ledger = Ledger(path, key, data, Budget(10.0, 1e-5))
        ledger.commit(ledger.reserve(Booking(run, 1, "plan", STEP.repeated(40), STEP, f"inputs {run}")), "output")
        ledger.close()
    assert not path.with_name("ledger.db-wal").exists()
    return path


def never_holds_for_other_facts(path: Path, key: SigningKey, truth: Snapshot) -> bool:
    """Return whether the damaged ledger is still taken for whole; then it must say what it said before."""
    try:
        found = read_snapshot(path)
        structural_problems(found, key=None)
        holds = verify(found, key.verifying).holds
    except CloisterError:
        return False
    if holds:
        assert found.entries == truth.entries
        assert found.data_sets == truth.data_sets
    return holds


@RECORDED
@given(data=st.data())
def test_flipped_bytes(whole: Path, key: SigningKey, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(content) - 1)))
        content[place] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path / "ledger.db"
    damaged.write_bytes(content)
    never_holds_for_other_facts(damaged, key, read_snapshot(whole))


@pytest.mark.parametrize("kept", [0, 1, 100, 4096, 5000, -1, -4096])
def test_a_truncated_file(whole: Path, key: SigningKey, tmp_path: Path, kept: int) -> None:
    (tmp_path / "ledger.db").write_bytes(whole.read_bytes()[:kept])
    assert not never_holds_for_other_facts(tmp_path / "ledger.db", key, read_snapshot(whole))


CELLS = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 9),
    st.floats(),
    st.binary(max_size=40),
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.sampled_from(
        ["{}", "[]", "null", "reserve", '{"epsilon": NaN}', '{"mechanism": {}}', b"\xff\xfe", b"\x02" * 21]
    ),
)


@RECORDED
@given(table=st.sampled_from(["entries", "data_sets"]), data=st.data())
def test_other_values_in_cells(whole: Path, key: SigningKey, tmp_path: Path, table: str, data: st.DataObject) -> None:
    names = list(Entry.__dataclass_fields__) if table == "entries" else ["fingerprint", "units"]
    damaged = tmp_path / "ledger.db"
    damaged.write_bytes(whole.read_bytes())
    connection = sqlite3.connect(damaged)
    row = data.draw(st.integers(1, 9))
    try:
        statement = f"UPDATE {table} SET {data.draw(st.sampled_from(names))} = ? WHERE rowid = ?"
        connection.execute(statement, (data.draw(CELLS), row))
        connection.commit()
    except sqlite3.IntegrityError:
        connection.rollback()
    finally:
        connection.close()
    never_holds_for_other_facts(damaged, key, read_snapshot(whole))


@pytest.mark.parametrize(
    ("statement", "text"),
    [
        ("UPDATE entries SET payload = x'00ff' WHERE sequence = 3", "entry 3 holds bytes where str belongs, in its"),
        ("UPDATE entries SET schema_version = 'x' WHERE sequence = 3", "entry 3 holds str where int belongs, in its"),
        ("UPDATE data_sets SET units = 7 WHERE rowid = 1", "the units of data set .* are int, not bytes"),
        ("UPDATE data_sets SET units = 'x' WHERE rowid = 1", "the units of data set .* are str, not bytes"),
        ("DROP TABLE data_sets", "there is no ledger at"),
        ("ALTER TABLE entries RENAME COLUMN at TO moment", "the table entries at .* has another layout"),
    ],
)
def test_what_cannot_be_read_is_said_and_what_to_do(whole: Path, tmp_path: Path, statement: str, text: str) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(whole.read_bytes())
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()
    with pytest.raises(PrivacyError, match=f"{text}.*"):
        read_snapshot(path)


def test_a_damaged_page_is_named_as_damage(whole: Path, tmp_path: Path) -> None:
    content = bytearray(whole.read_bytes())
    content[4096 : 2 * 4096] = b"\x07" * 4096
    (tmp_path / "ledger.db").write_bytes(content)
    with pytest.raises(PrivacyError, match=r"is damaged.* restore a backup"):
        read_snapshot(tmp_path / "ledger.db")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mechanism": None}, "entry 3 cannot be read: 'mechanism' is null, which cannot be"),
        ({"mechanism": {"sampling_rate": 2}}, "'mechanism' is .*, which cannot be"),
        ({"budget": {"epsilon": 1.0}}, "'budget' is .*, which cannot be"),
        ({"epsilon_after": "1"}, "'epsilon_after' is \"1\", which cannot be"),
        ({"round": True}, "'round' is true, which cannot be"),
    ],
)
def test_a_signed_entry_that_says_too_little_is_named(
    whole: Path, key: SigningKey, changes: dict[str, object], text: str
) -> None:
    """No release writes one; whoever holds the key might."""
    from datetime import datetime

    snapshot = read_snapshot(whole)
    chain: list[Entry] = []
    for entry in snapshot.entries:
        content = entry.content | (changes if entry.sequence == 3 else {})
        at = datetime.fromisoformat(entry.at)
        chain.append(seal(key, chain[-1] if chain else None, entry.kind, at, entry.fingerprint, content))  # type: ignore[arg-type]
    found = verify(Snapshot(tuple(chain), snapshot.data_sets), key.verifying)
    assert len(found.problems) == 1
    assert found.problems[0].sequence == 3
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(found.problems[0].text)


# -- copies that cannot be written


@pytest.fixture
def shown() -> Iterator[Path]:
    """A folder that other users may enter; pytest's own are closed to them."""
    folder = Path(tempfile.mkdtemp(prefix="cloister-shown-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def as_nobody(act: Callable[[], Snapshot]) -> Snapshot:
    """Act as a user to whom permissions apply."""
    if os.geteuid() != 0:
        return act()
    os.seteuid(65534)
    try:
        return act()
    finally:
        os.seteuid(0)


def test_a_read_only_copy_in_a_read_only_folder(whole: Path, key: SigningKey, shown: Path) -> None:
    copy = shown / "ledger.db"
    copy.write_bytes(whole.read_bytes())
    copy.chmod(0o444)
    shown.chmod(0o555)
    found = as_nobody(lambda: read_snapshot(copy))
    assert verify(found, key.verifying).holds
    assert found == read_snapshot(whole)
    assert [path.name for path in shown.iterdir()] == ["ledger.db"]


def test_what_may_not_be_read_is_an_error_and_no_traceback(whole: Path, shown: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can hide a file from somebody else")
    (shown / "closed").mkdir(mode=0o700)
    (shown / "ledger.db").write_bytes(whole.read_bytes())
    (shown / "ledger.db").chmod(0o600)
    for path in (shown / "closed" / "ledger.db", shown / "ledger.db"):
        with pytest.raises(PrivacyError, match=r"the ledger at .* cannot be opened: "):
            as_nobody(lambda path=path: read_snapshot(path))


def test_reading_changes_no_byte_and_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "ledger.db"
    copy.write_bytes(whole.read_bytes())
    assert read_snapshot(copy) == read_snapshot(whole)
    assert copy.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.db"]


def test_what_a_writer_has_not_yet_moved_into_the_file_is_read(
    open_ledger: Callable[..., Ledger], booking: Callable[..., Booking], path: Path
) -> None:
    """A reader beside a writer sees the journal too, not the main file alone."""
    ledger = open_ledger()
    holder = sqlite3.connect(path)
    holder.execute("SELECT * FROM entries").fetchone()
    ledger.reserve(booking(1))
    assert path.with_name("ledger.db-wal").stat().st_size
    assert [entry.kind for entry in read_snapshot(path).entries] == ["budget", "schedule", "reserve"]
    holder.close()


def test_nothing_in_the_state_is_open_to_others(tmp_path: Path, key: SigningKey) -> None:
    before = os.umask(0)
    try:
        journal = Journal(tmp_path / "state" / "ledger.db", key, head_file=tmp_path / "state" / "ledger.head")
        journal.set_budget(Budget(1.0, 1e-5), "")
        with sqlite3.connect(tmp_path / "state" / "ledger.db") as held:
            held.execute("SELECT * FROM entries").fetchone()
            journal.set_budget(Budget(0.5, 1e-5), "")
            modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
        held.close()
        journal.close()
    finally:
        os.umask(before)
    assert {"ledger.db", "ledger.db-wal", "ledger.head"} <= modes.keys()
    assert set(modes.values()) == {0o600}
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


# -- ledgers of the first version


def test_a_ledger_of_version_1_is_read_and_gone_on_with(
    path: Path,
    key: SigningKey,
    open_ledger: Callable[..., Ledger],
    booking: Callable[..., Booking],
    people: Callable[..., DataIdentity],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its order of the filter stays: outputs have been seen since."""
    monkeypatch.setattr("privacy.ledger.chain.SCHEMA_VERSION", 1)
    ledger = open_ledger(3.0)
    ledger.commit(ledger.reserve(booking(1)), "out")
    monkeypatch.undo()
    marked = DataIdentity(people().units, frozenset({b"m" * 16}))
    newer = open_ledger(3.0, data=marked)
    assert newer.spent() == pytest.approx(ledger.spent())
    quiet = SubsampledGaussian(0.05, 8.0, 10)
    after = newer.reserve(booking(1, run="second", mechanism=quiet)).epsilon_after

    from privacy.filter import RenyiFilter

    assert after == pytest.approx(RenyiFilter(3.0, 1e-5).epsilon_of([STEP, quiet]))
    assert after != pytest.approx(RenyiFilter(3.0, 1e-5, STEP).epsilon_of([STEP, quiet]))
    found = read_snapshot(path)
    assert {entry.schema_version for entry in found.entries} == {1, SCHEMA_VERSION}
    assert verify(found, key.verifying).problems == ()
