"""Records and persons as units."""

import random

import pytest

from client.units import units_of
from conf.schema.data import DataConfig, DataSource, TextColumns
from conf.schema.privacy import ExampleLevel, NoPrivacy, UserLevel
from privacy.identity import DataIdentity, identify
from protocol.errors import DataError

KEY = b"k" * 32
DATA = DataConfig(source=DataSource(path="notes.jsonl"), columns=TextColumns(), user_column="patient")
ROWS = [{"text": f"note {n}", "patient": f"p{n % 4}"} for n in range(22)]
USERS = UserLevel(noise_multiplier=1.0, max_records_per_user=3)


def test_every_record_is_its_own_unit() -> None:
    for privacy in (NoPrivacy(), ExampleLevel(noise_multiplier=1.0)):
        units = units_of(ROWS, privacy, DATA, KEY)
        assert units.members == tuple((position,) for position in range(22))
        assert len(set(units.names)) == 22


def test_a_record_is_what_is_read_of_it() -> None:
    """An export with one more column, or in another order, is the same data: the ledger must know it again."""
    exported = [{"body": row["text"], "row_id": str(n)} for n, row in enumerate(reversed(ROWS))]
    renamed = DATA.model_copy(update={"columns": TextColumns(text="body")})
    privacy = ExampleLevel(noise_multiplier=1.0)
    assert set(units_of(exported, privacy, renamed, KEY).names) == set(units_of(ROWS, privacy, DATA, KEY).names)


def test_a_user_owns_only_their_own_records_and_at_most_the_cap() -> None:
    units = units_of(ROWS, USERS, DATA, KEY)
    assert sorted(units.names) == [b"p0", b"p1", b"p2", b"p3"]
    for name, members in zip(units.names, units.members, strict=True):
        assert len(members) == 3
        assert {ROWS[position]["patient"] for position in members} == {name.decode()}


def test_which_records_are_kept_depends_on_the_key_and_not_on_the_order_of_the_file() -> None:
    def kept(rows: list[dict[str, str]], key: bytes) -> set[str]:
        return {rows[p]["text"] for members in units_of(rows, USERS, DATA, key).members for p in members}

    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert kept(ROWS, KEY) == kept(shuffled, KEY)
    assert kept(ROWS, KEY) != kept(ROWS, b"another key of thirty-two bytes.")


def test_adding_a_user_changes_no_other_users_records() -> None:
    more = [*ROWS, *({"text": f"new {n}", "patient": "p9"} for n in range(5))]
    before, after = units_of(ROWS, USERS, DATA, KEY), units_of(more, USERS, DATA, KEY)
    owned = dict(zip(after.names, after.members, strict=True))
    assert all(owned[name] == members for name, members in zip(before.names, before.members, strict=True))


def test_user_level_needs_a_user_of_every_record() -> None:
    with pytest.raises(DataError, match=r"user-level privacy needs data\.user_column"):
        units_of(ROWS, USERS, DATA.model_copy(update={"user_column": None}), KEY)
    with pytest.raises(DataError, match=r"row 23 has no value in data\.user_column='patient'"):
        units_of([*ROWS, {"text": "x", "patient": ""}], USERS, DATA, KEY)
    with pytest.raises(DataError, match=r"data\.user_column"):
        units_of(ROWS, USERS, DATA.model_copy(update={"user_column": "person"}), KEY)


def people(*names: object) -> list[dict[str, object]]:
    return [{"text": f"note {number}", "patient": name} for number, name in enumerate(names)]


def test_one_person_in_several_spellings_is_one_unit() -> None:
    """Otherwise each spelling would have the whole ε, and the person their sum."""
    units = units_of(people("Ann", "ann", "Ann\u00a0", "Müller", "Mu\u0308ller", "Ben", 7, 7.0, "７"), USERS, DATA, KEY)
    assert sorted(units.names) == [b"7", b"ann", b"ben", "müller".encode()]
    owned = dict(zip(units.names, units.members, strict=True))
    assert (owned[b"ann"], owned[b"7"], owned[b"ben"]) == ((0, 1, 2), (6, 7, 8), (5,))
    # The bound on a person's records holds over all of their spellings.
    more = units_of(people(*["Ann", "ANN", "ann "] * 4), USERS, DATA, KEY)
    assert [len(members) for members in more.members] == [3]


@pytest.mark.parametrize("other", ["ANN", "ann ", "\ufeffAnn", "Ａｎｎ"])
def test_the_ledger_knows_a_person_again_in_another_spelling(other: str) -> None:
    def identity(*names: object) -> DataIdentity:
        units = units_of(people(*names), USERS, DATA, KEY)
        return identify((*units.names, *units.spellings), KEY, units.marks)

    assert identity("Ann", "Ben").overlaps(identity(other, "Cleo"))
    assert not identity("Ann", "Ben").overlaps(identity("Anna", "Cleo"))
    # Ledgers of earlier versions hold the hash of the value as it was spelled.
    assert identity("Ann", "Ben").overlaps(identify([b"Ann"], KEY))


def test_a_name_that_is_no_unicode_is_a_name() -> None:
    assert len(units_of(people("a\ud800", "b"), USERS, DATA, KEY)) == 2
