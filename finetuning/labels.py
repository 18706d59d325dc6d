"""Which class a label means: by its name, or by its index in `task.labels`.

Every site of a federation decides alike, whichever of the labels it happens to hold:

* Where any of `task.labels` is itself a number, every label is a name: with the names "1" to "5", 1 is the first.
* Where none is, text that is a name is that name, and a number is an index, counted from 0. No value can be both.
* A data set uses one of the two. One that mixes them was put together from parts that count differently, perhaps.
* The name that a file's own features give to a number is a name, also where it looks like an index.

Names are compared exactly: another case or a space makes another name, which is refused with the nearest one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation

from finetuning.rows import Place, Row, StoredName, at_place, cell, nearest, place_of
from protocol.errors import DataError

__all__ = ["label_legend", "read_labels"]

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)
"""Files without types (CSV) write an index as text. 007 and +1 are no indices: they may be codes of another list."""


def read_labels(rows: Iterable[Row], column: str, labels: Sequence[str] | None) -> Iterator[int]:
    """Yield the class index of each row.

    Raises:
        DataError: at a row's place, for a label that is missing or not among `labels`, or the first one that is an
            index where others are names; there are no `labels`.
    """
    if not labels:
        raise DataError("labelled data needs the set of labels; set task=classification task.labels=[...]")
    names = _Names(labels)
    first: tuple[Place, object, bool] | None = None
    for number, row in enumerate(rows, start=1):
        place = place_of(row, number)
        with at_place(place):
            value = cell(row, column, "data.columns.label")
            index, by_name = names.read(value)
            first = first or (place, value, by_name)
            if by_name != first[2]:
                raise DataError(_mixture(value, by_name, first[0], first[1]))
        yield index


def label_legend(rows: Sequence[Row], column: str, labels: Sequence[str]) -> str | None:
    """Return what the numbers of data that `read_labels` accepts stand for; None where its labels are names."""
    by_name = not rows or _Names(labels).read(rows[0].get(column))[1]
    listed = ", ".join(f"{index} = {name}" for index, name in enumerate(labels))
    return None if by_name else f"labels are indices into task.labels: {listed}"


class _Names:
    """The label set, and how to look a value up in it."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._index_of = {label: index for index, label in enumerate(labels)}
        numbers = [_number(label) for label in labels]
        self._numbers_are_names = any(number is not None for number in numbers)
        # A number in a typed file is the name of equal value, where only one is.
        self._index_of_number = {
            number: index for index, number in enumerate(numbers) if number is not None and numbers.count(number) == 1
        }

    def read(self, value: object) -> tuple[int, bool]:
        """Return the class index, and whether the value was a name.

        Raises:
            DataError: it is neither a name nor an index.
        """
        index = self._named(value)
        if index is not None:
            return index, True
        index = None if self._numbers_are_names or isinstance(value, StoredName) else _index(value)
        if index is not None and index < len(self._labels):
            return index, False
        raise DataError(self._unknown(value))

    def _named(self, value: object) -> int | None:
        if isinstance(value, str):
            return self._index_of.get(str(value))
        if isinstance(value, bool):
            return self._index_of.get(str(value), self._index_of.get(str(value).lower()))  # JSON writes true
        if isinstance(value, int | float | Decimal):
            number = _number(value)
            return None if number is None else self._index_of.get(str(value), self._index_of_number.get(number))
        return None

    def _unknown(self, value: object) -> str:
        listed = ", ".join(self._labels)
        if self._numbers_are_names:
            known = f"({listed}); with numbers among them, a label is always a name, never an index"
        else:
            known = f"({listed}; or 0 to {len(self._labels) - 1})"
        if isinstance(value, StoredName):
            origin, fix = ", the name that the file itself gives to the class,", "name the classes in task.labels alike"
        else:
            origin, fix = " (missing)" if _is_missing(value) else "", "mend the row, or add the label to task.labels"
        return f"label {value!r:.60}{origin} is not in task.labels {known}{nearest(str(value), self._labels)}; {fix}"


def _number(value: object) -> Decimal | None:
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _index(value: object) -> int | None:
    if isinstance(value, str):
        return int(value) if _INDEX.fullmatch(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    number = _number(value)
    return int(number) if number is not None and number >= 0 and number == int(number) else None


def _is_missing(value: object) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    )


def _mixture(value: object, by_name: bool, place: Place, earlier: object) -> str:
    this, other = ("a name", "an index") if by_name else ("an index", "a name")
    return (
        f"label {value!r:.60} is {this} of task.labels, and {earlier!r:.60} at {place} is {other}: a data set that "
        "mixes them may count from another list; write the names everywhere"
    )
