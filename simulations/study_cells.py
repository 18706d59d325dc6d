"""A study's cells: one experiment each, one line of `results.csv` each, known again by the experiment's digest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MappingProxyType

from conf.compose import InvalidConfiguration, compose_experiment, parse_experiment
from conf.schema.experiment import Experiment
from protocol.errors import CloisterError
from server.summary import tuned_quality
from simulations.simulate import simulate
from simulations.study_lines import LineFile, work_through

__all__ = ["Cell", "Labels", "Line", "compose_cell", "expected_seconds", "finished", "run_cells"]

_RECORDS_PER_SECOND = 60.0
"""Of private training of the embedded model on one core at 80 tokens, for a first estimate."""
_MOST_READ = 256.0
"""Records per step, for an estimate."""
_USUAL_SITES = 4
"""Of data with sites of its own, before they are read: for an estimate."""
_SETTINGS = ("evaluation.max_examples=200", "logging.keep_checkpoints=1", "logging.progress=none", "runtime.threads=1")


@dataclass(frozen=True)
class Labels:
    """What a table says of a cell."""

    study: str
    data: str
    strategy: str
    codec: str
    ranks: str
    """Of the sites, `8,2` for turns; empty: the plan's."""
    epsilon: float
    """Infinite without privacy."""
    partition: str
    sites: int
    """0: as many as the data's own split has."""
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The cell in words."""
        told = (self.data, self.strategy, self.codec, self.ranks, f"ε {self.epsilon:g}", self.partition)
        return " ".join([*(part for part in told if part), f"{self.sites or 'own'} sites", f"seed {self.seed}"])


@dataclass(frozen=True)
class Cell:
    """One run, or the reason why the support matrix has none."""

    labels: Labels
    experiment: Experiment | None
    refused: str = ""

    @property
    def records(self) -> float:
        """How many records it trains on, expected."""
        if self.experiment is None:
            return 0.0
        return _records(self.experiment, self.labels.sites or _USUAL_SITES)


@dataclass(frozen=True)
class Line(Labels):
    """A cell's result.

    `quality` is the headline metric on the held-out records that the server may see, of the sites' own models where the
    strategy leaves a part of them there; `base` is that before training, both None where the cell was refused; bytes
    are those of all rounds and sites, of tensors and their headers; `groups` is JSON, quality by site where the data
    came with sites.
    """

    metric: str = ""
    base: float | None = None
    quality: float | None = None
    spent_epsilon: float | None = None
    bytes_up: float | None = None
    bytes_down: float | None = None
    values: int = 0
    """Trained per site."""
    updates: int = 0
    """Accepted, over all rounds and sites."""
    records: float = 0.0
    seconds: float = 0.0
    groups: str = "{}"
    refused: str = ""
    digest: str = ""

    @property
    def labels(self) -> Labels:
        """What was run."""
        return Labels(**{name: getattr(self, name) for name in Labels.__dataclass_fields__})

    @property
    def bytes_moved(self) -> float | None:
        """Up and down."""
        return None if self.bytes_up is None or self.bytes_down is None else self.bytes_up + self.bytes_down

    @property
    def bits_per_value(self) -> float | None:
        """Of an update on the wire, headers included."""
        return 8 * self.bytes_up / (self.values * self.updates) if self.bytes_up and self.values else None

    @property
    def quality_of(self) -> Mapping[str, float]:
        """Quality by site."""
        return MappingProxyType(json.loads(self.groups))


def compose_cell(labels: Labels, overrides: Iterable[str]) -> Cell:
    """Return the cell; what the support matrix or the schema refuses becomes a cell with the reason."""
    try:
        return Cell(labels, compose_experiment([f"name={labels.study}", *_SETTINGS, f"seed={labels.seed}", *overrides]))
    except InvalidConfiguration as error:
        return Cell(labels, None, _one_line(error))


@dataclass(frozen=True)
class _Job:
    labels: Labels
    experiment: str
    folder: Path


def run_cells(
    cells: Sequence[Cell],
    path: Path,
    on_line: Callable[[Line], None],
    *,
    workers: int = 1,
    prepare: Callable[[], None] | None = None,
) -> list[Line]:
    """Run the cells that `path/results.csv` has no line of, and return all lines in the order of the cells.

    Args:
        cells: what to run.
        path: the study's folder; each run's directory is in `runs/` there.
        on_line: takes each line, first those of an earlier start.
        workers: processes, one cell each at a time; 1 runs them in this one.
        prepare: called first in each new process.

    Raises:
        ConfigError: the folder holds another study's results.
    """
    results = LineFile(path / "results.csv", Line)
    done = finished(cells, path)
    for line in done.values():
        on_line(line)
    for cell in cells:
        if cell.experiment is None:
            done[cell.labels] = Line(**asdict(cell.labels), refused=cell.refused)
            on_line(done[cell.labels])
    todo = [
        _Job(cell.labels, cell.experiment.canonical_json(), path / "runs" / cell.experiment.digest[:16])
        for cell in cells
        if cell.labels not in done and cell.experiment is not None
    ]
    for line in work_through(todo, _run, workers, prepare):
        results.append(line)
        done[line.labels] = line
        on_line(line)
    return [done[cell.labels] for cell in cells]


def finished(cells: Iterable[Cell], path: Path) -> dict[Labels, Line]:
    """Return the lines of an earlier start, by cell. Another experiment's result is not taken for this one's."""
    known = {(line.labels, line.digest): line for line in LineFile(path / "results.csv", Line).read()}
    wanted = [(cell.labels, cell.experiment.digest) for cell in cells if cell.experiment is not None]
    return {labels: known[labels, digest] for labels, digest in wanted if (labels, digest) in known}


def expected_seconds(cells: Sequence[Cell], path: Path, workers: int) -> float:
    """Return how long the missing cells will take, at the speed of those that are done, or of the embedded model."""
    done = finished(cells, path)
    measured = [line for line in done.values() if line.seconds and line.records]
    speed = (
        sum(line.records for line in measured) / sum(line.seconds for line in measured)
        if measured
        else _RECORDS_PER_SECOND
    )
    return sum(cell.records for cell in cells if cell.labels not in done) / speed / workers


def _run(job: _Job) -> Line:
    experiment = parse_experiment(job.experiment)
    began = perf_counter()
    # What a stop left half done is no result.
    shutil.rmtree(job.folder, ignore_errors=True)
    line = partial(Line, **asdict(job.labels), digest=experiment.digest)
    try:
        summary = simulate(experiment, job.folder).summary
    except CloisterError as error:
        return line(refused=_one_line(error))
    final = summary["final"]
    quality, groups = tuned_quality(final)
    return line(
        metric=final["metric"],
        base=final["base"],
        quality=quality,
        spent_epsilon=summary["privacy"]["epsilon"],
        bytes_up=summary["bytes"]["up"],
        bytes_down=summary["bytes"]["down"],
        values=summary["adapter"]["trained_values"],
        updates=sum(len(each["accepted"]) for each in summary["rounds"]),
        records=_records(experiment, len(summary["sites"])),
        seconds=perf_counter() - began,
        groups=json.dumps(groups, sort_keys=True),
    )


def _records(experiment: Experiment, sites: int) -> float:
    federation = experiment.federation
    # A step on all records of a site, however many, is one on summaries that were computed once.
    batch = min(federation.local.expected_batch_size, _MOST_READ)
    return federation.rounds * federation.local.steps * batch * sites


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
