"""Rows from files, folders and the hub; every fault is a `DataError` that says where it is and how to mend it.

JSON lines and CSV are read as they stand: no type is guessed (`datasets` turns the label 007 into 7, the answer NA into
a missing value, and shifts the cells of an overlong CSV line), and a fault has a line number. The other formats go
through `datasets`, whose cache is a temporary folder: nothing is written beside private data, no copy of it is left
behind, and no pickle is read.
"""

from __future__ import annotations

import csv
import difflib
import json
import random
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from conf.schema.data import Columns, DataConfig, DataSource
from protocol.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Row", "cell", "check_columns", "limit_rows", "nearest", "read_rows", "split_rows"]

Row = Mapping[str, object]

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
_PLAIN_HUB_BUILDERS = frozenset({"arrow", "csv", "json", "parquet", "text"})


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
        return _from_hub(source)
    path = _existing(_resolved(source.path))
    rows: list[Row]
    if path.is_dir() and any((path / marker).exists() for marker in _ARROW_MARKERS):
        rows = _from_saved_folder(path, source.split)
    else:
        rows = [row for file in _files_of(path, source.format) for row in _from_file(file, source.format)]
    if not rows:
        raise DataError(f"{path} holds no records; give a file with at least one record in data.source.path")
    return rows


def split_rows(rows: Sequence[Row], config: DataConfig, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the training and the held-out rows, both in the order of `rows`.

    With `split_column` its value decides. Otherwise each row is held out with probability `heldout_fraction`,
    independently of every other row: one record more or less then leaves the odds of all others as they were, which a
    fixed count of held-out rows would not. Of two rows or more at least one lands on each side; a single row is trained
    on.

    Raises:
        DataError: no row has the value that marks training rows, or none the value that marks held-out ones although
            other values occur.
    """
    draw = random.Random(seed)
    chosen = limit_rows(rows, config.max_records, draw)
    if config.split_column is not None:
        return _split_by_column(chosen, config, config.split_column)
    is_heldout = [draw.random() < config.heldout_fraction for _ in chosen]
    if len(chosen) >= 2 and len(set(is_heldout)) == 1:
        is_heldout[draw.randrange(len(chosen))] ^= True
    elif len(chosen) == 1:
        is_heldout = [False]
    train = [row for row, held in zip(chosen, is_heldout, strict=True) if not held]
    return train, [row for row, held in zip(chosen, is_heldout, strict=True) if held]


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
            raise DataError(_missing_column(name, present, f"data.columns.{field}", extra))


def cell(row: Row, column: str, setting: str) -> object:
    """Return the value of a column in one row; `setting` is the configuration key that names the column.

    Raises:
        DataError: the row has no such column.
    """
    if column not in row:
        raise DataError(_missing_column(column, row, setting))
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


def _missing_column(column: str, present: Iterable[str], setting: str, extra: str = "") -> str:
    names = [str(name) for name in present]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"no column {column!r}; present: {shown or 'none'}{nearest(column, names)}; set {setting}=<column>{extra}"


def _split_by_column(rows: Sequence[Row], config: DataConfig, column: str) -> tuple[list[Row], list[Row]]:
    check = [str(cell(row, column, "data.split_column")) for row in rows]
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


def _resolved(path: str) -> Path:
    if path.startswith("embedded:"):
        from finetuning.embedded import resolve

        try:
            return Path(resolve(path))
        except (KeyError, ValueError) as error:
            raise DataError(f"{error}; set data.source.path") from error
    return Path(path).expanduser()


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


def _from_jsonl(file: Path) -> Iterable[Row]:
    with file.open("rb") as lines:
        if lines.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return _from_json_array(file)
        lines.seek(0)
        return [row for number, line in enumerate(lines, start=1) for row in _json_row(file, number, line)]


def _json_row(file: Path, number: int, line: bytes) -> Iterator[Row]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not text:
            return
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except ValueError as error:
        raise DataError(
            f"{file}, line {number}: not valid JSON ({error}); write one complete object per line, as json.dumps does"
        ) from error
    except RecursionError as error:
        raise DataError(f"{file}, line {number}: nested too deeply to read; flatten the object") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{file}, line {number}: a {type(value).__name__} instead of an object; "
            'write {"column": value, ...} on each line'
        )
    yield cast("Row", value)


def _from_json_array(file: Path) -> Iterable[Row]:
    try:
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}, line {error.lineno}: not valid JSON ({error.msg}); mend it, or write one object per line"
        ) from error
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(f"{file}, item {number}: a {type(value).__name__} instead of an object; remove or mend it")
    return values


def _from_csv(file: Path) -> Iterable[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            _check_header(file, header)
            return [_csv_row(file, reader.line_num, header, cells) for cells in reader if cells]
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        except csv.Error as error:
            raise DataError(
                f"{file}, line {reader.line_num}: not valid CSV ({error}); "
                "quote texts that contain separators or line breaks, and double the quotes inside them"
            ) from error


def _check_header(file: Path, header: Sequence[str]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if not header or repeated:
        fault = f"the header repeats {', '.join(map(repr, repeated))}" if repeated else "there is no header"
        raise DataError(f"{file}, line 1: {fault}; give each column its own name on the first line")


def _csv_row(file: Path, line: int, header: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(header):
        raise DataError(
            f"{file}, line {line}: {len(cells)} cells, but the header names {len(header)} columns; "
            "quote texts that contain separators or line breaks"
        )
    return dict(zip(header, cells, strict=True))


def _from_parquet(file: Path) -> Iterable[Row]:
    def load(cache: str) -> Dataset:
        from datasets import Dataset

        return Dataset.from_parquet(str(file), cache_dir=cache, keep_in_memory=True)

    return _loaded(file, "parquet", "write the file again", load)


def _from_arrow(file: Path) -> Iterable[Row]:
    def load(cache: str) -> Dataset:
        from datasets import Dataset

        return Dataset.from_file(str(file))

    return _loaded(file, "arrow", "write it again with Dataset.save_to_disk", load)


def _from_saved_folder(path: Path, split: str) -> list[Row]:
    def load(cache: str) -> Dataset:
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(path))
        if not isinstance(saved, DatasetDict):
            return saved
        if split not in saved:
            names = [str(name) for name in saved]
            raise DataError(
                f"{path} has no split {split!r}; present: {', '.join(names)}{nearest(split, names)}; "
                "set data.source.split"
            )
        return saved[split]

    return _loaded(path, "arrow", "write it again with save_to_disk", load)


def _from_hub(source: DataSource) -> list[Row]:
    def load(cache: str) -> Dataset:
        from datasets import load_dataset_builder

        # The usual cache, not the temporary one: these records are public and worth keeping.
        builder = load_dataset_builder(source.path, source.subset, revision=source.revision)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in _PLAIN_HUB_BUILDERS:
            raise DataError(
                f"{source.path} is stored as {kind}; only {', '.join(sorted(_PLAIN_HUB_BUILDERS))} are read from the "
                "hub; download it yourself, convert it to JSON lines, and set data.source.path and format"
            )
        builder.download_and_prepare()
        return cast("Dataset", builder.as_dataset(split=source.split))

    fix = "check data.source.path, subset, revision and split, and the network"
    return _loaded(source.path, "hub dataset", fix, load)


def _loaded(origin: object, kind: str, fix: str, load: Callable[[str], Dataset]) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="cloister-") as cache, _quiet_datasets():
        try:
            return cast("list[Row]", load(cache).to_list())
        except DataError:
            raise
        except Exception as error:  # `datasets` wraps readers of every kind, each with exceptions of its own
            reason = " ".join(str(_first_cause(error)).split())
            raise DataError(f"{origin}: cannot be read as {kind} ({reason}); {fix}") from error


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _quiet_datasets() -> Generator[None]:
    """No progress bars and no logged tracebacks while reading: the fault is in the DataError."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    were_disabled, level = are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not were_disabled:
            enable_progress_bars()


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    "jsonl": _from_jsonl,
    "csv": _from_csv,
    "parquet": _from_parquet,
    "arrow": _from_arrow,
}
