"""A label is a name or an index: decided by public facts, once per data set, and never both."""

from collections.abc import Sequence
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuning.labels import label_legend, read_labels
from finetuning.rows import Place, Row, SourceRow, StoredName
from protocol.errors import DataError

WORDS = ("no", "maybe", "yes")
STARS = ("1", "2", "3", "4", "5")


def rows(*labels: object) -> list[Row]:
    return [
        SourceRow({"text": "a", "label": label}, Place("a.csv", "line", at)) for at, label in enumerate(labels, start=2)
    ]


def read(labels: Sequence[object], names: Sequence[str]) -> list[int]:
    return list(read_labels(rows(*labels), "label", names))


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["yes", "no"], WORDS, [2, 0]),
        ([2, 0, "1", 1.0, Decimal(2)], WORDS, [2, 0, 1, 1, 2]),
        (["1", "5", "3"], STARS, [0, 4, 2]),
        ([1, 5, 3.0, Decimal(2)], STARS, [0, 4, 2, 1]),
        ([0, 1], ("1", "0"), [1, 0]),
        (["0", "1"], ("1", "0"), [1, 0]),
        ([-1, 0, 1], ("-1", "0", "1"), [0, 1, 2]),
        ([0.5, 1.0, 1], ("0.5", "1.0"), [0, 1, 1]),
        (["00", "01"], ("00", "01"), [0, 1]),
        ([True, False], ("false", "true"), [1, 0]),
        (["True", False], ("False", "True"), [1, 0]),
        ([StoredName("yes"), "no"], WORDS, [2, 0]),
        ([StoredName("2"), "1"], STARS, [1, 0]),
    ],
)
def test_what_a_label_means(labels: Sequence[object], names: Sequence[str], expected: list[int]) -> None:
    assert read(labels, names) == expected


@pytest.mark.parametrize("zero", [0, "0", 0.0, Decimal(0)])
@pytest.mark.parametrize("others", [[], [1, 2], ["5"]])
def test_numbers_are_names_where_any_name_is_a_number(zero: object, others: list[object]) -> None:
    """Also at a site that holds few of the labels, and with a name among them that is a word."""
    for names in (STARS, ("unknown", "1", "2", "5")):
        with pytest.raises(DataError, match=r"label .*0.* is not in task\.labels .*always a name, never an index"):
            read([*others, zero], names)


def test_two_names_of_one_value_are_told_apart_by_their_text_alone() -> None:
    assert read(["1", "1.0", "01"], ("1", "1.0", "01")) == [0, 1, 2]
    with pytest.raises(DataError, match="label Decimal"):
        read([Decimal("1.00")], ("1", "1.0"))


@pytest.mark.parametrize(("labels", "at"), [(["no", "no", 1], 4), ([1, "yes"], 3), (["0", "no"], 3), (["no", "0"], 3)])
def test_names_and_indices_do_not_mix(labels: list[object], at: int) -> None:
    message = rf"a\.csv, line {at}: label .* is an? (name|index) of task\.labels, and .* at a\.csv, line 2 is an? "
    with pytest.raises(DataError, match=message):
        read(labels, WORDS)


@pytest.mark.parametrize(
    "label",
    [
        "00",
        "01",
        "+1",
        " 1",
        "1 ",
        "1.0",
        "1_0",
        "²",
        "١",
        "9" * 5000,
        -1,
        "-1",
        3,
        "3",
        0.5,
        True,
        "Yes",
        "yes ",
        1e300,
        float("inf"),
        [0],
        {"name": "yes"},
        b"yes",
    ],
)
def test_what_is_neither_name_nor_index(label: object) -> None:
    with pytest.raises(
        DataError, match=r"(?s)a\.csv, line 3: label .* is not in task\.labels \(no, maybe, yes; or 0 to 2\)"
    ):
        read([0, label], WORDS)


@pytest.mark.parametrize("label", [None, "", "  ", float("nan")])
@pytest.mark.parametrize("names", [WORDS, STARS, ("None", "nan", "")])
def test_a_missing_label_is_called_so(label: object, names: Sequence[str]) -> None:
    if label == "" and "" in names:
        return
    with pytest.raises(DataError, match=r"a\.csv, line 2: label .* \(missing\) is not in task\.labels"):
        read([label], names)


@pytest.mark.parametrize(("label", "hint"), [("Yes", "'yes'"), ("yes ", "'yes'"), ("maybee", "'maybe'")])
def test_another_spelling_is_refused_with_the_nearest(label: str, hint: str) -> None:
    with pytest.raises(DataError, match=f"did you mean {hint}"):
        read([label], WORDS)


@pytest.mark.parametrize("name", ["1", "0", "negative"])
def test_a_name_that_the_file_stores_is_never_an_index(name: str) -> None:
    with pytest.raises(
        DataError, match=rf"label '{name}', the name that the file itself gives to the class, is not in"
    ):
        read([StoredName(name)], WORDS)


@given(st.data())
def test_a_part_of_the_data_is_read_as_the_whole_is(data: st.DataObject) -> None:
    """Sites hold parts: what they make of a label cannot depend on the others."""
    names = data.draw(st.sampled_from([WORDS, STARS, ("b", "2", "a"), ("0", "1"), ("1", "0")]))
    values = data.draw(st.lists(st.sampled_from([0, 1, 2, "0", "1", "2", 1.0, *names]), min_size=1, max_size=6))
    alone: list[int] = []
    try:
        for value in values:
            alone += read([value], names)
        whole = read(values, names)
    except DataError:
        return
    assert whole == alone


def test_the_legend_says_what_indices_stand_for() -> None:
    assert label_legend(rows(1, 0), "label", WORDS) == "labels are indices into task.labels: 0 = no, 1 = maybe, 2 = yes"
    assert label_legend(rows("no"), "label", WORDS) is None
    assert label_legend(rows(1), "label", STARS) is None
    assert label_legend([], "label", WORDS) is None
