"""What every long study needs: a CSV with one line per finished cell, and processes that work through the rest.

A study is started with the same command after a stop and does what is missing. A line is written when its cell is
done, and the file is replaced as a whole, so that no crash leaves half a line.
"""

from __future__ import annotations

import csv
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from finetuning.checkpoints import write_atomically
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


@dataclass(frozen=True)
class LineFile(Generic[Line]):
    """A CSV file of one dataclass's values: fields of type `str`, `int`, `float` and `float | None`, empty for None."""

    path: Path
    kind: type[Line]

    @property
    def columns(self) -> tuple[str, ...]:
        """The header."""
        return tuple(field.name for field in fields(self.kind))  # pyright: ignore[reportArgumentType] - a dataclass

    def read(self) -> list[Line]:
        """Return the lines; none where there is no file.

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
            return [self.kind(**{name: _READERS[hints[name]](line[name]) for name in self.columns}) for line in reader]

    def append(self, line: Line) -> None:
        """Write one line more; a crash leaves the file as it was."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        for each in (*self.read(), line):
            values = asdict(each)  # pyright: ignore[reportArgumentType] - a dataclass
            writer.writerow({name: "" if value is None else value for name, value in values.items()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, text.getvalue().encode())


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
    processes = min(workers, max(len(jobs), 1))
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=(prepare,))
    try:
        for future in as_completed([pool.submit(work, job) for job in jobs]):
            yield future.result()
    finally:
        # What a stop leaves waiting is not started.
        pool.shutdown(cancel_futures=True)


def _begin(prepare: Callable[[], None] | None) -> None:
    """Prepare a process, which ends when the one that started it does, however that ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
