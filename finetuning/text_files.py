"""Rows from JSON lines, JSON arrays, CSV and TSV, each with the line that it stands on.

They are read as they stand: no type is guessed (`datasets` turns the label 007 into 7, the answer NA into a missing
value, and shifts the cells of an overlong CSV line).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from finetuning.rows import Place, Row, SourceRow
from protocol.errors import DataError

__all__ = ["rows_of_csv", "rows_of_json"]

_SEPARATORS = {",": "','", ";": "';'", "\t": "a tab", "|": "'|'"}

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escape that may be one half of a pair; only then is a parsed line looked at more closely."""


def rows_of_json(file: Path) -> Iterator[Row]:
    """Yield one row per line that is not blank, or per item where the file is an array.

    Raises:
        DataError: naming the line (of an array's items: the item) that is no JSON object, or holds no valid text.
    """
    with file.open("rb") as lines:
        if lines.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _rows_of_array(file)
            return
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            yield from _row_of_line(Place(str(file), "line", number), line)


def _row_of_line(place: Place, line: bytes) -> Iterator[Row]:
    try:
        text = line.decode("utf-8-sig" if place.number == 1 else "utf-8").strip()
        if not text:
            return
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error) from error
    except ValueError as error:
        # A JSONDecodeError's own text counts lines within this one.
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise DataError(
            f"{place}: not valid JSON ({reason}); write one complete object per line, as json.dumps does"
        ) from error
    except RecursionError as error:
        raise DataError(f"{place}: nested too deeply to read; flatten the object") from error
    if not isinstance(value, dict):
        raise DataError(
            f'{place}: a {type(value).__name__} instead of an object; write {{"column": value, ...}} on each line'
        )
    row = cast("dict[str, object]", value)
    if _SURROGATE.search(line):
        _check_text(place, row)
    yield SourceRow(row, place)


def _rows_of_array(file: Path) -> Iterator[Row]:
    content = file.read_bytes()
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(_line_that_is_not_utf8(file), error) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}, line {error.lineno}: not valid JSON ({error.msg}); mend it, or write one object per line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); write one object per line") from error
    suspicious = _SURROGATE.search(content) is not None
    for number, value in enumerate(values, start=1):
        place = Place(str(file), "item", number)
        if not isinstance(value, dict):
            raise DataError(f"{place}: a {type(value).__name__} instead of an object; remove or mend it")
        row = cast("dict[str, object]", value)
        if suspicious:
            _check_text(place, row)
        yield SourceRow(row, place)


def _check_text(place: Place, row: dict[str, object]) -> None:
    """Refuse half a character: no encoding has it, so it can be neither tokenized nor shown nor booked."""
    for column, value in row.items():
        try:
            json.dumps([column, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise DataError(
                f"{place}: column {column!a} holds half of a character ({half}, a surrogate without its other "
                "half), which is no text; write the whole character, or \\ufffd in its place"
            ) from error


def _not_utf8(place: Place, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8")


def _line_that_is_not_utf8(file: Path) -> Place:
    """Return the first such line. A reader of text decodes ahead of the line that it is at."""
    content = file.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return Place(str(file), "line", content.count(b"\n", 0, error.start) + 1)
    raise AssertionError(f"{file} is UTF-8, or has changed")


def rows_of_csv(file: Path) -> Iterator[Row]:
    """Yield one row per record below the header, at the line on which the record starts; every cell is text.

    Raises:
        DataError: naming the line of a record that has not the header's columns, or is no CSV; the header is missing,
            repeats a name, or has another separator than the file's extension stands for.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    start = 1
    try:
        _check_separator(file, separator)
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=separator, strict=True)
            header = next(reader, [])
            _check_header(file, header)
            start = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield _csv_row(Place(str(file), "line", start), header, cells)
                start = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise _not_utf8(_line_that_is_not_utf8(file), error) from error
    except csv.Error as error:
        raise DataError(
            f"{file}, line {start}: not valid CSV ({error}); "
            "quote texts that contain separators or line breaks, and double the quotes inside them"
        ) from error


def _check_separator(file: Path, separator: str) -> None:
    """Refuse a header that is one name as this file is read, and several with another separator."""
    with file.open(encoding="utf-8-sig", newline="") as text:
        line = text.readline()
    if len(_names(line, separator)) > 1:
        return
    for other, shown in _SEPARATORS.items():
        if other != separator and len(_names(line, other)) > 1:
            extension = file.suffix or "such a"
            raise DataError(
                f"{file}, line 1: the separator is {shown}, but a {extension} file is read with "
                f"{_SEPARATORS[separator]}; save it with commas as .csv, or with tabs as .tsv"
            )


def _names(line: str, separator: str) -> Sequence[str]:
    try:
        return next(csv.reader([line], delimiter=separator, strict=True), [])
    except csv.Error:  # such as a quoted name with another separator behind it
        return []


def _check_header(file: Path, header: Sequence[str]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if not header or repeated:
        fault = f"the header repeats {', '.join(map(repr, repeated))}" if repeated else "there is no header"
        raise DataError(f"{file}, line 1: {fault}; give each column its own name on the first line")


def _csv_row(place: Place, header: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(header):
        raise DataError(
            f"{place}: {len(cells)} cells, but the header names {len(header)} columns; "
            "quote texts that contain separators or line breaks"
        )
    return SourceRow(dict(zip(header, cells, strict=True)), place)
