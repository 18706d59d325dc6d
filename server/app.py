"""The Flower ServerApp: composes the experiment, runs its rounds, and leaves a run directory."""

from __future__ import annotations

import logging
import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from conf.schema.experiment import Experiment
from finetuning.datasets import Row
from finetuning.models import base_digest
from server.collect import Waiting
from server.evaluation import build_evaluator
from server.events import Evaluated, Event, Observer, RoundFinished, SiteReplied
from server.rounds import Outcome, run_federation
from server.run_directory import RunDirectory

__all__ = ["Launch", "app", "launch_from_context", "new_run_path", "serve", "server_app"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """What a ServerApp is started with."""

    experiment: Experiment
    path: Path
    observers: Sequence[Observer] = ()
    heldout: Sequence[Row] | None = None
    expected_sites: int | None = None
    """How many sites must be connected; None takes `federation.expected_sites`."""
    waits_forever: bool = False
    """Sites take turns in this process: none is late, so `federation.reply_timeout_s` does not apply."""
    waiting: Waiting | None = None
    """How time passes while replies are awaited; None: as everywhere."""


def serve(grid: Grid, launch: Launch) -> Outcome:
    """Run an experiment on whatever runtime `grid` leads to."""
    experiment = launch.experiment
    directory = RunDirectory(launch.path, experiment, base_digest(experiment.model))

    def observe(event: Event) -> None:
        directory.observe(event)
        for observer in launch.observers:
            observer(event)

    with directory.recording():
        evaluator = build_evaluator(experiment, launch.heldout)
        expected = launch.expected_sites or experiment.federation.expected_sites
        timeout_s = math.inf if launch.waits_forever else experiment.federation.reply_timeout_s
        return run_federation(
            grid,
            experiment,
            evaluator,
            directory,
            observe,
            expected_sites=expected,
            timeout_s=timeout_s,
            waiting=launch.waiting,
        )


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
    return replace(launch, expected_sites=nodes)


def launch_from_context(context: Context) -> Launch:
    """Return the launch that Flower's run config describes: `experiment` (JSON), or `overrides` as on the command line.

    Raises:
        InvalidConfiguration: naming every problem.
    """
    from conf.compose import compose_experiment, parse_experiment

    stored, overrides = str(context.run_config.get("experiment", "")), str(context.run_config.get("overrides", ""))
    experiment = parse_experiment(stored) if stored else compose_experiment(shlex.split(overrides))
    home = Path(os.environ.get("CLOISTER_HOME", Path.home() / ".cloister"))
    path = new_run_path(experiment, home / "runs", datetime.now(UTC))
    _log_to_terminal()
    _log.info("run directory: %s", path)
    return Launch(experiment, path, observers=(_log_event,))


def new_run_path(experiment: Experiment, parent: Path, now: datetime) -> Path:
    """Return the run directory of an experiment that starts now."""
    given = experiment.logging.directory
    return Path(given) if given else parent / f"{now:%Y%m%d-%H%M%S}-{experiment.name}-{experiment.digest[:6]}"


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
    elif isinstance(event, RoundFinished):
        if event.accepted is None:
            _log.info("round %d: finished", event.round)
        else:
            _log.info("round %d: %d replies, %d not used", event.round, event.accepted, event.rejected)
    elif isinstance(event, Evaluated):
        _log.info("round %d: %s %.4g on held-out records", event.round, event.metric, event.value)


app = server_app(launch_from_context)
