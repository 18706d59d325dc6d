"""Whom records are about: one name for each person, however it is spelled."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from finetuning.rows import Place, Row, at_place, cell, named, place_of
from finetuning.spelling import canonical
from protocol.errors import DataError

__all__ = ["People", "is_blank", "name_of", "people_of", "spelling_of", "users_of"]

_SETTING = "data.user_column"
_WHOLE = re.compile(r"(-?[0-9]+)\.0*")
_MISSING = frozenset({"nan", "nat", "none", "null", "na", "n/a", "#n/a", "<na>", "\\n"})
"""What pandas, R, spreadsheets and databases write where a value is missing, in its canonical spelling."""


@dataclass(frozen=True)
class People:
    """The people of a data set: `names[i]` is that of row i, `spellings[name]` what stands for it in the column."""

    names: tuple[str, ...]
    spellings: Mapping[str, frozenset[str]]

    def __len__(self) -> int:
        return len(self.spellings)

    @property
    def joined(self) -> int:
        """How many spellings were joined with another of the same person."""
        return sum(len(spelled) - 1 for spelled in self.spellings.values())

    def sentence(self, column: str) -> str:
        """Return how many people there are, and how many spellings were joined: for the site's own eyes."""
        if not self.joined:
            return f"{_SETTING}={column!r} names {len(self)} people"
        return (
            f"{_SETTING}={column!r} names {len(self)} people in {len(self) + self.joined} spellings: {self.joined} "
            "differed from another only in case, blanks or the form of letters and digits, and were joined with it"
        )


def people_of(rows: Sequence[Row], column: str) -> People:
    """Return the people that `column` names, one per row.

    Raises:
        DataError: naming the first row that names nobody, or holds what cannot name one person.
    """
    names: list[str] = []
    spellings: dict[str, set[str]] = {}
    nobody: list[tuple[Place, object]] = []
    for number, row in enumerate(rows, start=1):
        place = place_of(row, number)
        with at_place(place):
            value = cell(row, column, _SETTING)
        if _is_nested(value):
            raise DataError(
                f"{place} has a {type(value).__name__} in {_SETTING}={column!r}; a text or a number must name "
                "the one person that the record is about: set it to a column with one value per record"
            )
        name = name_of(value)
        if name is None:
            nobody.append((place, value))
            continue
        names.append(name)
        spellings.setdefault(name, set()).add(str(value))
    if nobody:
        raise DataError(_of_nobody(nobody, column))
    return People(tuple(names), {name: frozenset(spelled) for name, spelled in spellings.items()})


def users_of(rows: Sequence[Row], column: str | None) -> int | None:
    """Return how many people the records are about; None where no column tells. Rows that name nobody do not count."""
    if column is None:
        return None
    return len({name_of(row.get(column)) for row in rows} - {None})


def name_of(value: object) -> str | None:
    """Return the one name of the person that a cell names; None where it names nobody.

    A text counts in its canonical spelling (`finetuning.spelling`), and a whole number whatever holds it: 7, 7.0, '7',
    '7.0' and a full-width '７' are one person. '007' is another. Nobody is named by null, by NaN, by a text of which
    nothing is to be seen, and by what programs write for a missing value.
    """
    name = "" if is_blank(value) else spelling_of(value)
    return None if not name or name in _MISSING else name


def is_blank(value: object) -> bool:
    """Return whether a cell is null, NaN, or a text of which nothing is to be seen."""
    return value is None or value != value or spelling_of(value) == ""


def spelling_of(value: object) -> str:
    """Return the one spelling of a cell that names somebody or something, whatever type holds it."""
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    elif isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)
    text = canonical(str(value))
    whole = _WHOLE.fullmatch(text)
    return text if whole is None else whole[1]


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping | list | tuple | set | frozenset)


def _of_nobody(rows: Sequence[tuple[Place, object]], column: str) -> str:
    place, value = rows[0]
    others = [each for each, _ in rows[1:]]
    more = f", nor have {len(others)} further rows ({named(others)})" if others else ""
    held = "" if is_blank(value) else f": {value!r} is what programs write for a missing one"
    return (
        f"{place} has no value in {_SETTING}={column!r}{more}{held}; a record of nobody cannot be protected as "
        "somebody's: fill it in, or remove the row"
    )
