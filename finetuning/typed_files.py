"""Rows from Parquet, Arrow and the hub, through `datasets`.

Its cache is a temporary folder: nothing is written beside private data, no copy of it is left behind, and no pickle is
read. Where the data's own features name its classes, a row holds the name and not the number: numbers follow the
order of the file, which need not be the order of `task.labels`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from conf.schema.data import DataSource
from finetuning.rows import Place, Row, SourceRow, StoredName, at_place, nearest
from protocol.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["rows_of_arrow", "rows_of_hub", "rows_of_parquet", "rows_of_saved_folder"]

_PLAIN_HUB_BUILDERS = frozenset({"arrow", "csv", "json", "parquet", "text"})

_Naming = Callable[[object], object]
"""Takes a cell to the same cell with class names in place of class numbers."""


def rows_of_parquet(file: Path) -> list[Row]:
    """Return the rows of one Parquet file.

    Raises:
        DataError: it cannot be read, or a class number has no name.
    """

    def load(cache: str) -> Dataset:
        from datasets import Dataset

        return Dataset.from_parquet(str(file), cache_dir=cache, keep_in_memory=True)

    return _loaded(file, "parquet", "write the file again", load)


def rows_of_arrow(file: Path) -> list[Row]:
    """Return the rows of one Arrow file.

    Raises:
        DataError: it cannot be read, or a class number has no name.
    """

    def load(cache: str) -> Dataset:
        from datasets import Dataset

        return Dataset.from_file(str(file))

    return _loaded(file, "arrow", "write it again with Dataset.save_to_disk", load)


def rows_of_saved_folder(path: Path, split: str) -> list[Row]:
    """Return the rows of a folder that `save_to_disk` wrote; `split` chooses among those of a `DatasetDict`.

    Raises:
        DataError: it cannot be read, has no such split, or a class number has no name.
    """

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


def rows_of_hub(source: DataSource) -> list[Row]:
    """Return the rows of a dataset of the hub, downloaded unless it is in the usual cache.

    Raises:
        DataError: it cannot be read, is stored in an unusual way, or a class number has no name.
    """

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
            dataset = load(cache)
            return _with_names(dataset.to_list(), dataset.features, str(origin))
        except DataError:
            raise
        except Exception as error:  # `datasets` wraps readers of every kind, each with exceptions of its own
            reason = " ".join(str(_first_cause(error)).split())
            raise DataError(f"{origin}: cannot be read as {kind} ({reason}); {fix}") from error


def _with_names(rows: list[dict[str, object]], features: Mapping[str, object], origin: str) -> list[Row]:
    namings = {column: naming for column, feature in features.items() if (naming := _naming(feature)) is not None}
    found: list[Row] = []
    for number, row in enumerate(rows, start=1):
        place = Place(origin, "row", number)
        for column, naming in namings.items():
            with at_place(f"{place}, column {column!r}"):
                row[column] = naming(row[column])
        found.append(SourceRow(row, place))
    return found


def _naming(feature: Any) -> _Naming | None:
    """Return how to name the classes in a column; None where it holds none. Lists and structs may hold them too."""
    from datasets import ClassLabel, LargeList, List

    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
        # `ClassLabel(num_classes=n)` has no names of its own: it calls its classes by their numbers.
        return None if names == tuple(map(str, range(len(names)))) else lambda value: _named_class(value, names)
    if isinstance(feature, List | LargeList):
        return _naming_each(_naming(feature.feature))
    if isinstance(feature, list):
        return _naming_each(_naming(cast("list[Any]", feature)[0]))
    if isinstance(feature, Mapping):
        fields = cast("Mapping[str, Any]", feature)
        inner = {name: naming for name, field in fields.items() if (naming := _naming(field)) is not None}
        return (lambda value: _named_fields(value, inner)) if inner else None
    return None


def _named_class(value: object, names: tuple[str, ...]) -> str | None:
    if not isinstance(value, int) or value < 0:  # null, and -1, which stands for a record without a class
        return None
    if value >= len(names):
        raise DataError(f"class {value} has no name: the file itself names 0 to {len(names) - 1}; write the file again")
    return StoredName(names[value])


def _naming_each(naming: _Naming | None) -> _Naming | None:
    if naming is None:
        return None
    return lambda value: [naming(item) for item in cast("list[object]", value)] if isinstance(value, list) else value


def _named_fields(value: object, namings: Mapping[str, _Naming]) -> object:
    if not isinstance(value, Mapping):
        return value
    struct = cast("Mapping[str, object]", value)
    return {name: namings[name](field) if name in namings else field for name, field in struct.items()}


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
