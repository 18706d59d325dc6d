"""Everything a run leaves behind, in one folder.

::

    config.json      the validated experiment; `cloister simulate --from RUN` repeats it
    metrics.jsonl    one event a line, written as it happens
    summary.json     what the run did (server/summary.py)
    adapter/         the final adapter in PEFT format
    checkpoints/     the newest adapters, by round
    report.html      the same for people (server/report.py)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from conf.schema.experiment import Experiment
from finetuning.adapters import AdaptedModel
from finetuning.checkpoints import save_tensors, write_atomically
from finetuning.export import export_adapter
from protocol.errors import ConfigError
from protocol.tensors import NamedTensors
from server.budget import ServerBooks
from server.events import Event
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
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        books: ServerBooks | None = None,
    ) -> None:
        """Create the folder and store the configuration.

        `books` are those of the server's ledger, for client-level privacy; None keeps it in the run directory, so that
        it ends with the run.

        Raises:
            ConfigError: the folder exists and is not empty.
        """
        refuse_existing(path)
        self.path = path
        self.run = path.name
        self.books = books or ServerBooks(path / "server", experiment.federation.server_budget)
        self._experiment = experiment
        self._base_digest = base_digest
        self._events: list[Event] = []
        self._started = now()
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "config.json", experiment.canonical_json().encode())

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything observed so far."""
        return tuple(self._events)

    def observe(self, event: Event) -> None:
        """Append an event to `metrics.jsonl`."""
        self._events.append(event)
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(asdict(event), default=_plain, sort_keys=True) + "\n")

    def save_checkpoint(self, round_number: int, adapter: NamedTensors) -> None:
        """Store a round's adapter, and drop the oldest beyond `logging.keep_checkpoints`."""
        folder = self.path / "checkpoints"
        metadata = {"round": str(round_number), "run": self.run, "config_digest": self._experiment.digest}
        save_tensors(folder / f"round-{round_number:05d}.safetensors", adapter, metadata)
        for old in sorted(folder.glob("round-*.safetensors"))[: -self._experiment.logging.keep_checkpoints]:
            old.unlink()

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
        self._write_summary("finished", "")

    def summary(self, status: str = "finished", error: str = "") -> dict[str, Any]:
        """Return the summary of what was observed so far."""
        return summarize(
            self._experiment,
            self._events,
            base_digest=self._base_digest,
            started=self._started,
            status=status,
            error=error,
        )

    def _write_summary(self, status: str, error: str) -> None:
        summary = self.summary(status, error)
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False).encode())
        write_report(self.path / "report.html", summary, self._experiment)

    def _base_name(self, adapted: AdaptedModel) -> str:
        path = self._experiment.model.path
        return str(adapted.base.network.config.name_or_path) if path.startswith("embedded:") else path

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


def _person(promise: Mapping[str, Any]) -> str:
    """Return what a promise comes to for a person who may be known at several sites."""
    several, epsilon = promise["sites_per_person"], promise["epsilon_over_sites"]
    if several == 1:
        return "It counts on each person being known at one site."
    figure = "unknown" if epsilon is None else f"{epsilon:.3f}"
    return f"For a person known at up to {several} sites together: ε = {figure}."


def _plain(value: object) -> object:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)
