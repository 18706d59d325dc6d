"""Flower's simulation engine on Ray: sites train side by side, each worker process with its own copy of the base.

`flwr.simulation.run_simulation` is deprecated in Flower 1.41 and is the only way into the engine that keeps the
ServerApp in this process, where the live display is. It is named in this file and nowhere else; `flwr run .` starts the
same apps on the same engine without it (docs/runtimes.md).
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from client.app import client_app
from client.site import Site
from conf.compose import parse_experiment
from conf.schema.execution import Ray
from conf.schema.site import SiteBudget
from protocol.errors import ConfigError, FederationError
from server.app import Launch, serve
from simulations.population import Population

__all__ = ["run_on_ray"]

_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # gpus_per_site=0 means that a site sees no GPU, also in later versions of Ray.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Ray lowers its workers' priority by 15; beside any other load they would hardly run.
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class _SitesOnRay:
    """Finds a node's site inside a worker. Small: the records are in Ray's object store, not in every message."""

    experiment: str
    state: Path
    budgets: Mapping[str, SiteBudget] | None
    parts: Any

    def __call__(self, context: Any) -> Site:
        return _sites(self.experiment, self.state, _json(self.budgets), self.parts)[
            int(context.node_config["partition-id"])
        ]


@lru_cache(maxsize=1)
def _sites(experiment: str, state: Path, budgets: str | None, parts: Any) -> Sequence[Site]:
    """Return all sites, opened once per worker; a site reads nothing before its first instruction."""
    import ray

    population = Population(ray.get(parts), ())
    given = None if budgets is None else TypeAdapter(dict[str, SiteBudget]).validate_json(budgets)
    return list(population.sites(parse_experiment(experiment), state, given).values())


def _json(budgets: Mapping[str, SiteBudget] | None) -> str | None:
    """Return the budgets as a value that can be compared and hashed."""
    return None if budgets is None else TypeAdapter(dict[str, SiteBudget]).dump_json(dict(budgets)).decode()


def run_on_ray(
    launch: Launch, population: Population, state: Path | None = None, budgets: Mapping[str, SiteBudget] | None = None
) -> None:
    """Run an experiment on Flower's simulation engine, one node per site.

    The ServerApp runs in a thread of this process, so observers are called as on every runtime.

    Args:
        launch: what the ServerApp runs.
        population: the sites' records.
        state: where the sites keep their states; None: `sites/` in the run directory.
        budgets: the sites' budgets, where they are those of a sweep.

    Raises:
        CloisterError: as raised by the ServerApp.
        ConfigError: this machine has less than `runtime.cpus_per_site` or `runtime.gpus_per_site`.
        FederationError: the engine itself broke down.
    """
    runtime = launch.experiment.runtime
    if not isinstance(runtime, Ray):
        raise ConfigError(f"runtime.kind={runtime.kind} is not Flower's engine; use runtime=ray")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    stopped = threading.Event()
    with _ray(runtime) as put:
        parts = put({name: [dict(row) for row in rows] for name, rows in population.parts.items()})
        find_site = _SitesOnRay(
            launch.experiment.canonical_json(), (state or launch.path / "sites").absolute(), budgets, parts
        )
        try:
            _run(launch, find_site, len(population.parts), runtime, stopped)
        finally:
            # The engine does not stop a ServerApp that waits for replies; its thread would outlive the run.
            stopped.set()


def _run(launch: Launch, find_site: Callable[[Any], Site], nodes: int, runtime: Ray, stopped: threading.Event) -> None:
    """Run the engine until the ServerApp ends; what the ServerApp raises is raised here, unchanged."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    raised: list[BaseException] = []
    finished = threading.Event()
    flower_app = ServerApp()

    @flower_app.main()
    def main(grid: Grid, _context: Context) -> None:  # pyright: ignore[reportUnusedFunction]
        try:
            serve(_stoppable(grid, stopped), launch)
            finished.set()
        except BaseException as error:
            raised.append(error)
            raise

    try:
        with _quiet_flower():
            run_simulation(flower_app, client_app(find_site), nodes, backend_config=_backend(runtime))
    except Exception as error:
        if not raised:
            raise FederationError(f"Flower's simulation engine broke down: {error}") from error
    if raised:
        raise raised[0]
    if not finished.is_set():
        raise FederationError("Flower's simulation engine ended before the run did; its log above says why")


def _backend(runtime: Ray) -> dict[str, Any]:
    return {"client_resources": {"num_cpus": runtime.cpus_per_site, "num_gpus": runtime.gpus_per_site}}


@contextmanager
def _ray(runtime: Ray) -> Generator[Callable[[Mapping[str, Any]], Any]]:
    """Start Ray on this machine and yield what puts a value into its object store.

    Raises:
        ConfigError: it has not the resources of a single site.
    """
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the accelerator setting above
        ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        resources: Mapping[str, float] = ray.cluster_resources()
        for setting, kind, wanted in (
            ("cpus_per_site", "CPU", runtime.cpus_per_site),
            ("gpus_per_site", "GPU", runtime.gpus_per_site),
        ):
            if wanted > resources.get(kind, 0.0):
                raise ConfigError(
                    f"runtime.{setting}={wanted:g} is above the {resources.get(kind, 0.0):g} {kind}s of this machine; "
                    "no site could ever run"
                )
        yield ray.put
    finally:
        ray.shutdown()


@contextmanager
def _quiet_flower() -> Generator[None]:
    """Silence Flower's deprecation warning and its progress; its errors still show."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _stoppable(grid: Any, stopped: threading.Event) -> Any:
    """Return `grid`, whose waits end with an error once the engine has stopped."""
    pull, nodes = grid.pull_messages, grid.get_node_ids

    def checked() -> None:
        if stopped.is_set():
            raise FederationError("Flower's simulation engine has stopped")

    def pull_messages(message_ids: Iterable[str]) -> Any:
        checked()
        return pull(message_ids)

    def get_node_ids() -> Any:
        checked()
        return nodes()

    grid.pull_messages, grid.get_node_ids = pull_messages, get_node_ids
    return grid
