"""Whom records are about, whatever type and spelling a column has."""

import datetime
from decimal import Decimal

import pytest

from finetuning.people import is_blank, name_of, people_of, users_of
from protocol.errors import DataError

NAMES = ["Ann", "ann", "Ann ", "Müller", "Mu\u0308ller", "Ben"]


def rows(*values: object) -> list[dict[str, object]]:
    return [{"person": value, "text": f"note {number}"} for number, value in enumerate(values)]


def test_a_person_has_one_name() -> None:
    people = people_of(rows(*NAMES), "person")
    assert people.names == ("ann", "ann", "ann", "müller", "müller", "ben")
    assert (len(people), people.joined) == (3, 3)
    assert people.sentence("person").startswith("data.user_column='person' names 3 people in 6 spellings: 3 differed")
    assert users_of(rows(*NAMES), "person") == 3


@pytest.mark.parametrize("value", [7, 7.0, "7", "7.0", "7.", " 7\u00a0", "７", "\u200b7", "٧", Decimal("7.00"), b"7"])
def test_a_number_is_one_person_whatever_holds_it(value: object) -> None:
    assert name_of(value) == "7"


def test_other_values_stay_apart() -> None:
    values = ["7", "07", "70", "-7", "7.5", "7a", "1e3", 1000, "1000.0", datetime.date(2030, 1, 2), "2030-01-02", True]
    assert len(people_of(rows(*values), "person")) == len(values) - 2  # 1000 and the date stand there twice
    assert name_of(2**80) == str(2**80)
    assert name_of(float("inf")) == "inf"


def test_without_another_spelling_nothing_is_said_of_joining() -> None:
    people = people_of(rows("a", "a", 7, "7"), "person")
    assert (len(people), people.joined) == (2, 0)
    assert people.sentence("person") == "data.user_column='person' names 2 people"


NOBODY = [
    None,
    "",
    " ",
    "\u200b",
    "\u00a0\t",
    "\ufeff",
    float("nan"),
    Decimal("NaN"),
    "NaN",
    "None",
    "null",
    "N/A",
    "NA",
]


@pytest.mark.parametrize("value", NOBODY)
def test_nobody_is_no_person(value: object) -> None:
    assert name_of(value) is None
    with pytest.raises(DataError, match=r"row 2 has no value in data\.user_column='person', nor have 1 further rows"):
        people_of(rows("a", value, "b", value), "person")
    with pytest.raises(DataError, match=r"row 1 has no value .* fill it in, or remove the row"):
        people_of(rows(value, "a"), "person")
    assert users_of(rows("a", value, "b"), "person") == 2


def test_a_word_for_nothing_is_shown() -> None:
    with pytest.raises(DataError, match="'None' is what programs write for a missing one"):
        people_of(rows("None"), "person")
    assert is_blank(float("nan"))
    assert not is_blank("NA")


@pytest.mark.parametrize("value", [["ann"], ["ann", "ben"], {"id": 7}, ()])
def test_a_list_or_an_object_names_no_single_person(value: object) -> None:
    """A record of two people would have to be protected as both of theirs."""
    with pytest.raises(
        DataError, match=rf"row 2 has a {type(value).__name__} in data\.user_column='person'; a text or a"
    ):
        people_of(rows("a", value), "person")


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match=r"no column 'persn'; .* did you mean 'person'"):
        people_of(rows("a"), "persn")
    assert users_of(rows("a"), None) is None
