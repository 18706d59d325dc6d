"""The first fault of a data set, found before it is split and dealt out: the same row, whatever the seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

from conf.schema.data import Columns, LabelledColumns
from finetuning.labels import read_labels
from finetuning.prompts import check_content
from finetuning.rows import Row, at_place, place_of
from protocol.errors import DataError

__all__ = ["RowFault", "first_fault"]


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row that cannot be used, and the sentence on it, with its place."""

    row: Row
    sentence: str


def first_fault(rows: Sequence[Row], columns: Columns, labels: Sequence[str] | None) -> RowFault | None:
    """Return the first row in the order of the source whose columns, texts or label cannot be used, or None.

    What needs a tokenizer is not looked at: lengths, and how a chat is written.
    """
    classes: Iterator[int | None] = repeat(None)
    if isinstance(columns, LabelledColumns):
        classes = read_labels(rows, columns.label, labels)
    for number, row in enumerate(rows, start=1):
        try:
            with at_place(place_of(row, number)):
                check_content(row, columns)
            next(classes)
        except DataError as error:
            return RowFault(row, str(error))
    return None
