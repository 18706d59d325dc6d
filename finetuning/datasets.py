"""Rows from files, folders and the hub; every fault is a `DataError` that says where it is and how to mend it.

How each format is read: `finetuning.text_files` and `finetuning.typed_files`. Each row knows its file and line.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from conf.schema.data import Columns, DataConfig, DataSource
from finetuning.people import name_of
from finetuning.rows import Row, at_place, cell, missing_column, nearest, place_of
from finetuning.text_files import rows_of_csv, rows_of_json
from finetuning.typed_files import rows_of_arrow, rows_of_hub, rows_of_parquet, rows_of_saved_folder
from protocol.errors import DataError

__all__ = ["Row", "cell", "check_columns", "limit_rows", "nearest", "read_rows", "rows_in_use", "split_rows"]

_FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_ARROW_MARKERS = ("state.json", "dataset_dict.json")


def read_rows(source: DataSource) -> list[Row]:
    """Return every row of a source, in file order; the files of a folder are read in the order of their names.

    ======== =================================================================================
    jsonl    one JSON object per line (blank lines are skipped), or one JSON array of objects
    csv      every value is text, also `001` and `NA`; `.tsv` is separated by tabs
    parquet  one file, or a folder of them
    arrow    a folder written by `save_to_disk`, or one arrow file
    hub      downloaded by `datasets`, only when `format=hub` says so
    ======== =================================================================================

    Raises:
        DataError: the file is missing, empty, malformed, or of an unknown type.
    """
    if source.format == "hub":
        return rows_of_hub(source)
    path = _existing(_resolved(source.path))
    rows: list[Row]
    if path.is_dir() and any((path / marker).exists() for marker in _ARROW_MARKERS):
        rows = rows_of_saved_folder(path, source.split)
    else:
        rows = [row for file in _files_of(path, source.format) for row in _from_file(file, source.format)]
    if not rows:
        raise DataError(f"{path} holds no records; give a file with at least one record in data.source.path")
    return rows


def split_rows(rows: Sequence[Row], config: DataConfig, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the training and the held-out rows, both in the order of `rows`.

    With `split_column` its value decides. Otherwise each row is held out with probability `heldout_fraction`,
    independently of every other row: one record more or less then leaves the odds of all others as they were, which a
    fixed count of held-out rows would not. Rows of one group (`group_column`, else `user_column`) share one draw, which
    follows from the group's name. Of two rows or groups or more at least one lands on each side; a single one is
    trained on.

    Raises:
        DataError: no row has the value that marks training rows, or none the value that marks held-out ones although
            other values occur.
    """
    draw = random.Random(seed)
    chosen = limit_rows(rows, config.max_records, draw)
    if config.split_column is not None:
        return _split_by_column(chosen, config, config.split_column)
    column = config.group_column or config.user_column
    names = [str(number) for number in range(len(chosen))] if column is None else _groups(chosen, config, column)
    is_heldout = _drawn(list(dict.fromkeys(names)), config.heldout_fraction, draw, named=column is not None, seed=seed)
    train = [row for row, name in zip(chosen, names, strict=True) if not is_heldout[name]]
    return train, [row for row, name in zip(chosen, names, strict=True) if is_heldout[name]]


def _drawn(names: Sequence[str], fraction: float, draw: random.Random, *, named: bool, seed: int) -> dict[str, bool]:
    """Return whether each name is held out: by a draw in their order, or by one of its own where names mean something:
    who else is there then changes nothing."""
    draws = [random.Random(f"{seed}|{name}").random() if named else draw.random() for name in names]
    held = [each < fraction for each in draws]
    if len(names) >= 2 and len(set(held)) == 1:
        held[draw.randrange(len(names))] ^= True
    elif len(names) == 1:
        held = [False]
    return dict(zip(names, held, strict=True))


def _groups(rows: Sequence[Row], config: DataConfig, column: str) -> list[str]:
    """Return the group of each row, however spelled; a row that names none is one of its own."""
    present = dict.fromkeys(name for row in rows for name in row)
    if config.group_column is not None and rows and column not in present:
        raise DataError(missing_column(column, present, "data.group_column"))
    groups: list[str] = []
    for number, row in enumerate(rows):
        name = name_of(row.get(column))
        groups.append(f"row {number}" if name is None else f"group {name}")
    return groups


def rows_in_use(rows: Iterable[Row], config: DataConfig) -> list[Row]:
    """Return the rows that some seed could train on or hold out: all but those that the split column leaves out."""
    if config.split_column is None:
        return list(rows)
    sides = (config.train_value, config.heldout_value)
    return [row for row in rows if str(row.get(config.split_column)) in sides]


def limit_rows(rows: Sequence[Row], most: int | None, draw: random.Random) -> list[Row]:
    """Return all rows, or `most` of them drawn without replacement, in their order."""
    if most is None or len(rows) <= most:
        return list(rows)
    return [rows[index] for index in sorted(draw.sample(range(len(rows)), most))]


def check_columns(rows: Iterable[Row], columns: Columns) -> None:
    """Check that each column that `columns` names occurs in at least one row.

    Raises:
        DataError: naming the column, those present, the nearest of them, and the setting to change.
    """
    wanted = {field: str(name) for field, name in columns if field != "kind" and name is not None}
    present: dict[str, None] = {}
    for row in rows:
        present.update(dict.fromkeys(row))
        if all(name in present for name in wanted.values()):
            return
    for field, name in wanted.items():
        if name not in present:
            extra = "; or null if the data has none" if field == "input" else ""
            raise DataError(missing_column(name, present, f"data.columns.{field}", extra))


def _split_by_column(rows: Sequence[Row], config: DataConfig, column: str) -> tuple[list[Row], list[Row]]:
    check = [_split_value(row, column, number) for number, row in enumerate(rows, start=1)]
    train = [row for row, value in zip(rows, check, strict=True) if value == config.train_value]
    heldout = [row for row, value in zip(rows, check, strict=True) if value == config.heldout_value]
    found = sorted(set(check))
    wanted = (("train_value", config.train_value, train), ("heldout_value", config.heldout_value, heldout))
    others_exist = any(value not in (config.train_value, config.heldout_value) for value in found)
    for setting, value, side in wanted:
        if side or not rows or (setting == "heldout_value" and not others_exist):
            continue
        shown = ", ".join(repr(name) for name in found[:10])
        raise DataError(
            f"no record has {column}={value!r}; values found: {shown}{nearest(value, found)}; "
            f"set data.{setting}, or data.split_column=null to split by data.heldout_fraction"
        )
    return train, heldout


def _split_value(row: Row, column: str, number: int) -> str:
    with at_place(place_of(row, number)):
        return str(cell(row, column, "data.split_column"))


def _resolved(path: str) -> Path:
    from finetuning.embedded import resolve

    try:
        return Path(resolve(path))
    except (KeyError, ValueError) as error:
        raise DataError(f"{error}; set data.source.path") from error


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    folder = path.parent
    if not folder.is_dir():
        raise DataError(
            f"{path} does not exist, nor does its folder {folder}; set data.source.path "
            "(for a dataset of the hub also data.source.format=hub)"
        )
    siblings = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
    close = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.4) or siblings[:5]
    beside = f"{folder} holds {', '.join(close)}" if close else f"{folder} is empty"
    raise DataError(f"{path} does not exist; {beside}; set data.source.path")


def _files_of(path: Path, given: str) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(item for item in path.iterdir() if item.is_file() and item.suffix.lower() in _FORMAT_OF_SUFFIX)
    if given != "auto":
        files = [file for file in files if _FORMAT_OF_SUFFIX[file.suffix.lower()] == given]
    kinds = sorted({_FORMAT_OF_SUFFIX[file.suffix.lower()] for file in files})
    if not files:
        raise DataError(
            f"the folder {path} holds no {'data' if given == 'auto' else given} file; "
            f"known extensions: {', '.join(_FORMAT_OF_SUFFIX)}"
        )
    if len(kinds) > 1:
        raise DataError(f"the folder {path} mixes {', '.join(kinds)}; set data.source.format to the one to read")
    return files


def _from_file(file: Path, given: str) -> Iterable[Row]:
    suffix = file.suffix.lower()
    kind = _FORMAT_OF_SUFFIX.get(suffix) if given == "auto" else given
    if kind is None:
        raise DataError(
            f"{file}: extension {suffix or 'missing'!r} is not known ({', '.join(_FORMAT_OF_SUFFIX)}); "
            "set data.source.format to jsonl, csv, parquet or arrow"
        )
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty (0 bytes); give a file with at least one record in data.source.path")
    return _READERS[kind](file)


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    "jsonl": rows_of_json,
    "csv": rows_of_csv,
    "parquet": rows_of_parquet,
    "arrow": rows_of_arrow,
}
