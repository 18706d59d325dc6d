"""Everything a run leaves behind, in one folder.

::

    config.json      the validated experiment; `cloister simulate --from RUN` repeats it
    metrics.jsonl    one event a line, written as it happens
    summary.json     what the run did (server/summary.py)
    adapter/         the final adapter in PEFT format
    checkpoints/     what the newest rounds left, to go on from
    report.html      the same for people (server/report.py)
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from conf.schema.experiment import Experiment
from conf.schema.paths import expanded
from finetuning.adapters import AdaptedModel
from finetuning.checkpoints import write_atomically
from finetuning.export import export_adapter
from finetuning.tokenization_report import TokenizationReport
from protocol.errors import ConfigError
from protocol.tensors import NamedTensors
from server.best import BestRound, best_evaluation, load_best, save_best
from server.budget import ServerBooks
from server.checkpoint import Checkpoint, load_newest, save_checkpoint
from server.events import Evaluated, Event, RunFinished, parse_event, surviving
from server.report import write_report
from server.summary import summarize

__all__ = ["RunDirectory"]


class RunDirectory:
    """The folder of one run. `observe` is an `Observer`."""

    def __init__(
        self,
        path: Path,
        experiment: Experiment,
        base_digest: str,
        *,
        resume: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        books: ServerBooks | None = None,
        records: Mapping[str, TokenizationReport] | None = None,
    ) -> None:
        """Create the folder and store the configuration; with `resume`, open the folder of a run that was interrupted.

        `books` are those of the server's ledger, for client-level privacy; None keeps it in the run directory, so that
        it ends with the run. `records`, of simulated sites alone, go into the summary.

        Raises:
            ConfigError: the folder exists and is not empty; or it is to be resumed and holds no run, another
                experiment, or a run that is still going on, or has finished and left its summary and report. One that
                was stopped between its last round and these is resumed to write them.
        """
        if not resume:
            refuse_existing(path)
        self.path = path
        self.run = path.name
        self.books = books or ServerBooks(path / "server", experiment.federation.server_budget)
        self._experiment = experiment
        self._records = records
        self._base_digest = base_digest
        self._started = now()
        if resume:
            _refuse_other(path, experiment)
        path.mkdir(parents=True, exist_ok=True)
        self._handle = _lock(path)
        self._events: list[Event] = surviving(_stored_events(path)) if resume else []
        if self.finished is not None and _is_told(path):
            raise ConfigError(f"run {path} has finished; to repeat it: cloister simulate --from {path}")
        write_atomically(path / "config.json", experiment.canonical_json().encode())

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything observed so far."""
        return tuple(self._events)

    @property
    def finished(self) -> RunFinished | None:
        """The event with which the last round's adapter was stored; None before."""
        return next((event for event in self._events if isinstance(event, RunFinished)), None)

    def observe(self, event: Event) -> None:
        """Append an event to `metrics.jsonl`."""
        self._events = surviving([*self._events, event])
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(asdict(event), default=_plain, sort_keys=True) + "\n")

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Store what a round leaves, and drop the oldest beyond `logging.keep_checkpoints`."""
        folder = self.path / "checkpoints"
        save_checkpoint(folder, checkpoint, **self._identity)
        earlier = sorted(folder.glob("round-*.safetensors"))[: -self._experiment.logging.keep_checkpoints]
        # The hidden ones are what a process that was killed left of a checkpoint; this one holds the run's lock.
        for old in (*earlier, *folder.glob(".round-*")):
            old.unlink()

    def newest_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint to go on from; None before the first."""
        return load_newest(self.path / "checkpoints", **self._identity)

    @property
    def best(self) -> BestRound | None:
        """The best round so far; None unless held-out records are public and were measured on."""
        return load_best(self.path / "checkpoints", run=self.run) if self._experiment.evaluation.public else None

    def keep_best(self, round_number: int, adapter: NamedTensors) -> None:
        """Store a round's adapter where it is the best so far by public held-out records."""
        best = best_evaluation(self._events) if self._experiment.evaluation.public else None
        if best is not None and best.round == round_number:
            save_best(self.path / "checkpoints", BestRound(round_number, adapter), run=self.run)

    def newest_evaluation(self) -> Evaluated | None:
        """Return the newest evaluation that was observed."""
        return next((event for event in reversed(self._events) if isinstance(event, Evaluated)), None)

    @property
    def _identity(self) -> dict[str, str]:
        return {"run": self.run, "config_digest": self._experiment.digest, "base_digest": self._base_digest}

    def save_adapter(self, adapted: AdaptedModel, adapter: NamedTensors) -> None:
        """Store the final adapter in PEFT format."""
        export_adapter(self.path / "adapter", adapted, adapter, base=self._base_name(adapted), card=self._card())

    @contextmanager
    def recording(self) -> Generator[None]:
        """Write `summary.json` and `report.html` when the block ends, also when it fails."""
        try:
            yield
        except BaseException as error:
            self._write_summary("failed", f"{type(error).__name__}: {error}")
            raise
        else:
            self._write_summary("finished", "")
        finally:
            self.close()

    def close(self) -> None:
        """Let another process go on with the run."""
        os.close(self._handle)

    def summary(self, status: str = "finished", error: str = "") -> dict[str, Any]:
        """Return the summary of what was observed so far."""
        return summarize(
            self._experiment,
            self._events,
            base_digest=self._base_digest,
            started=self._started,
            status=status,
            error=error,
            records=self._records,
        )

    def _write_summary(self, status: str, error: str) -> None:
        summary = self.summary(status, error)
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False).encode())
        write_report(self.path / "report.html", summary, self._experiment)

    def _base_name(self, adapted: AdaptedModel) -> str:
        path = self._experiment.model.path
        return str(adapted.base.network.config.name_or_path) if path.startswith("embedded:") else expanded(path)

    def _card(self) -> str:
        privacy = self.summary()["privacy"]
        promises = [
            f"ε = {part['epsilon']:.3f}, δ = {part['delta']:.2g} ({part['relation']}; "
            f"{'' if part['unit'] == 'site' else 'the largest of all sites; '}{part['accountant']}). {_person(part)}"
            for part in privacy["joint"]
            if part["delta"] is not None
        ]
        promise = "\n\n".join(promises) or "**Not private**: nothing protects the records it was trained on."
        return (
            "---\nlibrary_name: peft\n"
            f"base_model: {self._experiment.model.path}\n---\n\n# {self._experiment.name}\n\n"
            f"A LoRA adapter made by Cloister, strategy `{self._experiment.strategy.kind}`, run `{self.run}`.\n\n"
            f"{promise}\n"
        )


def refuse_existing(path: Path) -> None:
    """Raise when a run would overwrite another one.

    Raises:
        ConfigError: the folder exists and is not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"run directory {path} already exists and is not empty; give another logging.directory, or move it away"
        )


def _refuse_other(path: Path, experiment: Experiment) -> None:
    config = path / "config.json"
    if not config.is_file():
        raise ConfigError(f"{path} is no run directory: it has no config.json, so there is nothing to resume")
    if Experiment.model_validate_json(config.read_bytes()).digest != experiment.digest:
        raise ConfigError(f"run {path} was started with another experiment; a run is resumed as it was")


def _is_told(path: Path) -> bool:
    """Return whether a run that finished has said so in both of its files."""
    try:
        status = json.loads((path / "summary.json").read_bytes())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return status == "finished" and (path / "report.html").is_file()


def _lock(path: Path) -> int:
    """Lock a run's folder and return the open handle; the system releases it when this process ends, however it ends.

    Raises:
        ConfigError: another process has it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ConfigError(f"run {path} is still going on in another process; stop that one first") from error
    return handle


def _stored_events(path: Path) -> list[Event]:
    """Return the events of an interrupted run; a line that a crash cut short is removed from the file."""
    metrics = path / "metrics.jsonl"
    if not metrics.exists():
        return []
    content = metrics.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomically(metrics, whole)
    return [parse_event(line) for line in whole.splitlines()]


def _person(promise: Mapping[str, Any]) -> str:
    """Return what a promise comes to for a person who may be known at several sites."""
    several, epsilon = promise["sites_per_person"], promise["epsilon_over_sites"]
    if several == 1:
        return "It counts on each person being known at one site."
    figure = "unknown" if epsilon is None else f"{epsilon:.3f}"
    return f"For a person known at up to {several} sites together: ε = {figure}."


def _plain(value: object) -> object:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)
