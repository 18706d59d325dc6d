"""The Flower ServerApp: composes the experiment, runs its rounds, and leaves a run directory."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from conf.schema.experiment import Experiment
from conf.schema.paths import expanded
from finetuning.models import base_digest
from finetuning.rows import Row
from finetuning.tokenization_report import TokenizationReport
from protocol.errors import ConfigError
from protocol.tensors import NamedTensors, digest
from server.best import best_evaluation
from server.budget import ServerBooks
from server.collect import Waiting
from server.evaluation import Evaluator, build_evaluator
from server.events import Evaluated, Event, Observer, PersonalEvaluated, RoundFinished, RunResumed, SiteReplied
from server.rounds import Outcome, run_federation
from server.run_directory import RunDirectory

__all__ = ["Launch", "app", "interrupted_run", "launch_from_context", "new_run_path", "serve", "server_app"]

_log = logging.getLogger(__name__)
_PULLERS = 8


@dataclass(frozen=True)
class Launch:
    """What a ServerApp is started with."""

    experiment: Experiment
    path: Path
    observers: Sequence[Observer] = ()
    heldout: Sequence[Row] | None = None
    expected_sites: int | None = None
    """How many sites must be connected; None takes `federation.expected_sites`."""
    books: ServerBooks | None = None
    """Of the server's ledger; None keeps it in the run directory, unless `federation.server_ledger` names a folder."""
    waits_forever: bool = False
    """Sites take turns in this process: none is late, so `federation.reply_timeout_s` does not apply."""
    waiting: Waiting | None = None
    """How time passes while replies are awaited; None: as everywhere."""
    pullers: int = 0
    """Threads that wait for replies; 0 where sites are simulated, since their work is done inside the wait."""
    personal: Callable[[NamedTensors], Mapping[str, NamedTensors]] | None = None
    """From the final adapter to each simulated site's own model, where the strategy leaves a part at the sites."""
    resume: bool = False
    """Go on with the run in `path`, from its newest checkpoint."""
    records: Mapping[str, TokenizationReport] | None = None
    """What became of each simulated site's rows; real sites tell nobody."""


def serve(grid: Grid, launch: Launch) -> Outcome:
    """Run an experiment on whatever runtime `grid` leads to."""
    experiment = launch.experiment
    directory = RunDirectory(
        launch.path,
        experiment,
        base_digest(experiment.model),
        books=_books(launch),
        resume=launch.resume,
        records=launch.records,
    )

    def observe(event: Event) -> None:
        directory.observe(event)
        for observer in launch.observers:
            observer(event)

    finished = _finished_before(directory)
    with directory.recording():
        evaluator = build_evaluator(experiment, launch.heldout)
        outcome = finished or _federate(grid, launch, evaluator, directory, observe)
        if launch.personal is not None and not any(isinstance(each, PersonalEvaluated) for each in directory.events):
            found = evaluator.evaluate_each(launch.personal(outcome.adapter))
            if found is not None:
                observe(found)
        return outcome


def _federate(grid: Grid, launch: Launch, evaluator: Evaluator, directory: RunDirectory, observe: Observer) -> Outcome:
    federation = launch.experiment.federation
    return run_federation(
        grid,
        launch.experiment,
        evaluator,
        directory,
        observe,
        expected_sites=launch.expected_sites or federation.expected_sites,
        timeout_s=math.inf if launch.waits_forever else federation.reply_timeout_s,
        pullers=launch.pullers,
        waiting=launch.waiting,
    )


def _finished_before(directory: RunDirectory) -> Outcome | None:
    """Return what a run came to that was stopped after its last round, before its summary and report were there; None
    while rounds are left. No site is asked again for it: they may have left, and their budgets are spent.

    Raises:
        ConfigError: the checkpoint of the last round is gone.
    """
    finished = directory.finished
    if finished is None:
        return None
    checkpoint, best = directory.newest_checkpoint(), directory.best
    kept = best or checkpoint
    if kept is None or digest(kept.adapter) != finished.adapter_digest:
        directory.close()  # as it was left: a summary that is there stays
        raise ConfigError(
            f"run {directory.path} finished with adapter {finished.adapter_digest[:12]}, and no checkpoint there holds "
            "it; restore the folder's checkpoints, or use the adapter in it as it is"
        )
    evaluation = directory.newest_evaluation() if best is None else best_evaluation(directory.events)
    return Outcome(kept.adapter, evaluation)


def _books(launch: Launch) -> ServerBooks | None:
    federation = launch.experiment.federation
    if federation.server_ledger is None:
        return launch.books
    return ServerBooks(Path(expanded(federation.server_ledger)), federation.server_budget)


def server_app(find_launch: Callable[[Context], Launch]) -> ServerApp:
    """Return the ServerApp that runs what `find_launch` finds."""
    flower_app = ServerApp()

    @flower_app.main()
    def main(grid: Grid, context: Context) -> None:  # pyright: ignore[reportUnusedFunction]
        serve(grid, _on_flowers_engine(grid, find_launch(context)))

    return flower_app


def _on_flowers_engine(grid: Grid, launch: Launch) -> Launch:
    """Return the launch that waits for every simulated site, where `grid` is the simulation engine's.

    The engine's number of nodes is an option of `flwr run` that no project file can set, 2 unless given. A part of the
    sites must not train because somebody forgot it, so `cloister.simulated_nodes` of the installed package compares.
    """
    if not isinstance(grid, InMemoryGrid):
        return launch
    nodes = len(list(grid.get_node_ids()))
    for entry in entry_points(group="cloister.simulated_nodes"):
        entry.load()(launch.experiment, nodes)
    # One simulation after another spends nothing of real sites, so each keeps its books for itself.
    return replace(launch, expected_sites=nodes, pullers=0, books=None)


def launch_from_context(context: Context) -> Launch:
    """Return the launch that Flower's run config describes: `experiment` (JSON), `overrides` as on the command line, or
    `resume`, the name of an interrupted run in this server's `runs` folder.

    `digest` is the SHA-256 of `experiment`, `run` names the run directory; both are optional.

    Raises:
        ConfigError: naming every problem; the experiment does not have its digest, or `run` is no plain name.
    """
    from conf.compose import compose_experiment, parse_experiment

    given = {key: str(value) for key, value in context.run_config.items()}
    stored, resumed = given.get("experiment", ""), given.get("resume", "")
    _check_digest(stored, given.get("digest", ""))
    home = Path(expanded(os.environ.get("CLOISTER_HOME", "~/.cloister")))
    runs = home / "runs"
    if resumed:
        path = interrupted_run(runs, resumed)
        experiment = parse_experiment((path / "config.json").read_bytes())
    else:
        experiment = parse_experiment(stored) if stored else compose_experiment(shlex.split(given.get("overrides", "")))
        path = _named_run_path(given.get("run", ""), runs) or new_run_path(experiment, runs, datetime.now(UTC))
    _log_to_terminal()
    _log.info("run directory: %s", path)
    books = ServerBooks(home / "server", experiment.federation.server_budget)
    return Launch(experiment, path, observers=(_log_event,), books=books, pullers=_PULLERS, resume=bool(resumed))


def interrupted_run(runs: Path, name: str) -> Path:
    """Return the folder of a run by its name, or by its path.

    Raises:
        ConfigError: there is none.
    """
    path = runs / name
    if not (path / "config.json").is_file():
        known = ", ".join(sorted(each.parent.name for each in runs.glob("*/config.json"))[-5:]) or "none"
        raise ConfigError(f"there is no run {name!r} to resume in {runs}; the newest there: {known}")
    return path


def _check_digest(stored: str, digest: str) -> None:
    found = hashlib.sha256(stored.encode()).hexdigest()
    if digest and digest != found:
        raise ConfigError(
            f"the experiment that arrived has SHA-256 {found[:12]}, the one that was submitted {digest[:12]}; "
            "submit it again with cloister run"
        )


def _named_run_path(run: str, parent: Path) -> Path | None:
    if run and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", run):
        raise ConfigError(f"run={run!r} is no plain name of a run directory; use letters, digits, . _ -")
    return parent / run if run else None


def new_run_path(experiment: Experiment, parent: Path, now: datetime) -> Path:
    """Return the run directory of an experiment that starts now."""
    given = experiment.logging.directory
    return Path(expanded(given)) if given else parent / f"{now:%Y%m%d-%H%M%S}-{experiment.name}-{experiment.digest[:6]}"


def _log_to_terminal() -> None:
    """Show this package's progress; Flower passes the output on to `flwr run --stream`."""
    logger = logging.getLogger(__package__)
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def _log_event(event: Event) -> None:
    if isinstance(event, SiteReplied) and not event.accepted:
        _log.warning("round %d: %s not used: %s, %s", event.round, event.site, event.code, event.reason)
    elif isinstance(event, RunResumed):
        _log.info("goes on after round %d", event.round)
    elif isinstance(event, RoundFinished):
        if event.accepted is None:
            _log.info("round %d: finished", event.round)
        else:
            _log.info("round %d: %d replies, %d not used", event.round, event.accepted, event.rejected)
    elif isinstance(event, Evaluated):
        _log.info("round %d: %s %.4g on held-out records", event.round, event.metric, event.value)


app = server_app(launch_from_context)
