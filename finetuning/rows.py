"""A row, the place it was read from, and its cells. Whatever is wrong with a row is reported at that place."""

from __future__ import annotations

import difflib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from protocol.errors import DataError

__all__ = [
    "Place",
    "Row",
    "SourceRow",
    "StoredName",
    "at_place",
    "cell",
    "missing_column",
    "named",
    "nearest",
    "place_of",
]

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: the `number`-th (from 1) `unit` of a source; without a source, of the rows at hand.

    >>> str(Place("/data/notes.csv", "line", 52))
    '/data/notes.csv, line 52'
    """

    source: str | None
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.unit} {self.number}" if self.source is None else f"{self.source}, {self.unit} {self.number}"


class SourceRow(dict[str, object]):
    """A row that knows its place, which splitting and dealing out do not change; equal to a dict of the same cells."""

    __slots__ = ("place",)

    def __init__(self, cells: Mapping[str, object], place: Place) -> None:
        super().__init__(cells)
        self.place = place


class StoredName(str):
    """The name that a file's own features give to a class number. A name such as "3" is never an index."""

    __slots__ = ()


def place_of(row: Row, number: int) -> Place:
    """Return a row's place; a row that was not read from anywhere is the `number`-th of those at hand."""
    return row.place if isinstance(row, SourceRow) else Place(None, "row", number)


@contextmanager
def at_place(place: object) -> Generator[None]:
    """Put a place in front of the message of a `DataError`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def named(places: Sequence[Place], *, most: int = 10) -> str:
    """Return a list of places for a sentence, at most `most` of them.

    >>> named([Place("a.csv", "line", 2), Place("a.csv", "line", 5), Place("b.csv", "line", 2)])
    'lines 2, 5 of a.csv; line 2 of b.csv'
    >>> named([Place(None, "row", 3), Place(None, "row", 4)], most=1)
    '3, ...'
    """
    numbers: dict[tuple[str | None, str], list[int]] = {}
    for place in places[:most]:
        numbers.setdefault((place.source, place.unit), []).append(place.number)
    parts = [_numbered(source, unit, found) for (source, unit), found in numbers.items()]
    return "; ".join(parts) + (", ..." if len(places) > most else "")


def _numbered(source: str | None, unit: str, numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers))
    if source is None:
        return listed
    return f"{unit}{'s' if len(numbers) > 1 else ''} {listed} of {source}"


def cell(row: Row, column: str, setting: str) -> object:
    """Return the value of a column in one row; `setting` is the configuration key that names the column.

    Raises:
        DataError: the row has no such column.
    """
    if column not in row:
        raise DataError(missing_column(column, row, setting))
    return row[column]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the most similar known name, or nothing.

    >>> nearest("promt", ["completion", "prompt"])
    "; did you mean 'prompt'?"
    >>> nearest("zebra", ["prompt"])
    ''
    """
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def missing_column(column: str, present: Iterable[str], setting: str, extra: str = "") -> str:
    """Return the sentence on a column that is not there."""
    names = [str(name) for name in present]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"no column {column!r}; present: {shown or 'none'}{nearest(column, names)}; set {setting}=<column>{extra}"
