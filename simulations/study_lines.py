"""What every long study needs: a CSV with one line per finished cell, and processes that work through the rest.

A study is started with the same command after a stop and does what is missing. A line is written when its cell is
done, and a line that a crash cut off is no line.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from protocol.errors import ConfigError

__all__ = ["LineFile", "work_through"]

Line = TypeVar("Line")
Job = TypeVar("Job")

_READERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    float | None: lambda text: float(text) if text else None,
}
_END = "end"
"""The last column: a line without it was cut off."""


@dataclass(frozen=True)
class LineFile(Generic[Line]):
    """A CSV file of one dataclass's values: fields of type `str`, `int`, `float` and `float | None`, empty for None."""

    path: Path
    kind: type[Line]

    @property
    def columns(self) -> tuple[str, ...]:
        """The header."""
        return (*(field.name for field in fields(self.kind)), _END)  # pyright: ignore[reportArgumentType] - a dataclass

    def read(self) -> list[Line]:
        """Return the whole lines; none where there is no file.

        Raises:
            ConfigError: the file has other columns, as another study's or version's has.
        """
        if not self.path.is_file():
            return []
        hints = get_type_hints(self.kind)
        with self.path.open(newline="") as stream:
            reader = csv.DictReader(stream)
            if reader.fieldnames and tuple(reader.fieldnames) != self.columns:
                raise ConfigError(
                    f"{self.path} has the columns {', '.join(reader.fieldnames)}, not {', '.join(self.columns)}; "
                    "give another folder"
                )
            whole = [line for line in reader if line[_END] == "."]
        return [self.kind(**{name: _READERS[hints[name]](line[name]) for name in hints}) for line in whole]

    def append(self, line: Line) -> None:
        """Write one line, whole or not at all as far as a reader is concerned."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists() or not self.path.stat().st_size
        cut_off = not is_new and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", newline="") as stream:
            if cut_off:
                stream.write("\r\n")
            writer = csv.DictWriter(stream, self.columns)
            if is_new:
                writer.writeheader()
            values = {name: "" if value is None else value for name, value in asdict(line).items()}  # pyright: ignore[reportArgumentType] - a dataclass
            writer.writerow({**values, _END: "."})
            stream.flush()
            os.fsync(stream.fileno())


def work_through(
    jobs: Sequence[Job], work: Callable[[Job], Line], workers: int, prepare: Callable[[], None] | None = None
) -> Iterator[Line]:
    """Yield what `work` returns of each job, as each is done.

    Args:
        jobs: values that can be pickled.
        work: a function of a module, or a `functools.partial` of one, so that other processes find it.
        workers: processes; 1 works in this one.
        prepare: called first in each new process.
    """
    if workers == 1:
        yield from (work(job) for job in jobs)
        return
    # Spawned, not forked: torch's and Flower's threads do not survive a fork.
    pool = ProcessPoolExecutor(min(workers, max(len(jobs), 1)), mp_context=get_context("spawn"), initializer=prepare)
    try:
        for future in as_completed([pool.submit(work, job) for job in jobs]):
            yield future.result()
    finally:
        # What a stop leaves waiting is not started.
        pool.shutdown(cancel_futures=True)
