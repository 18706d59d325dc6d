"""One experiment on one machine: check everything, then run the ServerApp on the chosen runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from client.app import client_app
from client.site import Site
from conf.schema.experiment import Experiment
from protocol.errors import ConfigError
from protocol.instructions import client_plan
from server.app import Launch, serve
from server.collect import Waiting
from server.events import Observer
from server.run_directory import refuse_existing
from simulations.books import SharedBooks
from simulations.conditions import DelayedGrid, SimulatedTime
from simulations.in_process import InProcessGrid
from simulations.personal import personal_models
from simulations.population import Population, build_population

__all__ = ["Simulated", "simulate"]


@dataclass(frozen=True)
class Simulated:
    """What a simulation left behind."""

    path: Path
    summary: dict[str, Any]


def simulate(
    experiment: Experiment,
    path: Path,
    observers: Sequence[Observer] = (),
    population: Population | None = None,
    *,
    books: SharedBooks | None = None,
    resume: bool = False,
) -> Simulated:
    """Run an experiment and return its run directory's path and summary.

    Args:
        experiment: what to run.
        path: the run directory, which must not exist yet, unless it is to be resumed.
        observers: take the run's events, for a live display.
        population: the sites' records; None reads them as the experiment describes.
        resume: go on from the newest checkpoint in `path`, with the sites' own files there.
        books: of the sweep that this run belongs to; None keeps them in the run directory.

    Raises:
        CloisterError: naming what is wrong; a problem with a site's data, model or budget shows before any training.
    """
    if not resume:
        refuse_existing(path)
    elif not (path / "sites").is_dir():
        raise ConfigError(
            f"run {path} holds no sites: a run of a sweep keeps their ledgers in the sweep's folder; "
            "start the sweep again"
        )
    population = population or build_population(experiment)
    _check_cohort(experiment, len(population.parts))
    state, budgets = (path / "sites", None) if books is None else (books.sites, books.budgets)
    sites = population.sites(experiment, state, budgets)
    rehearse_all(experiment, path.name, list(sites.values()))
    in_process = experiment.runtime.kind == "in_process"
    launch = Launch(
        experiment,
        path,
        observers,
        population.heldout,
        len(sites),
        books=None if books is None else books.server,
        waits_forever=in_process,
        personal=personal_models(experiment, path.name, sites.values()),
        resume=resume,
        records={name: site.tokenization for name, site in sites.items() if site.tokenization is not None},
    )
    if experiment.runtime.kind == "ray":
        from simulations.ray_engine import run_on_ray

        run_on_ray(launch, population, state, budgets)
    else:
        _run_in_process(launch, sites)
    return Simulated(path, json.loads((path / "summary.json").read_text()))


def rehearse_all(experiment: Experiment, run: str, sites: Sequence[Site]) -> None:
    """Let every site check the plan against its data, model and budget; nothing is spent.

    Raises:
        CloisterError: of the first site that cannot take part.
    """
    plan = client_plan(experiment, run)
    for site in sites:
        site.rehearse(plan)


def _run_in_process(launch: Launch, sites: dict[str, Site]) -> None:
    nodes = list(sites.values())
    grid: Grid = InProcessGrid(
        client_app(lambda context: nodes[int(context.node_config["partition-id"])]),
        [{"partition-id": position} for position in range(len(nodes))],
    )
    runtime = launch.experiment.runtime
    if runtime.kind == "in_process" and runtime.reply_delays_s:
        time = SimulatedTime()
        grid = DelayedGrid(grid, runtime.reply_delays_s, time)
        launch = replace(launch, waiting=Waiting(time.now, time.sleep))
    try:
        serve(grid, launch)
    finally:
        for site in nodes:
            site.close()


def _check_cohort(experiment: Experiment, population: int) -> None:
    """A natural key says only now how many sites there are."""
    federation = experiment.federation
    for name, wanted in (("cohort_size", federation.cohort_size), ("min_replies", federation.min_replies)):
        if wanted is not None and wanted > population:
            raise ConfigError(
                f"federation.{name}={wanted} is larger than the population of {population} sites; "
                f"use at most {population}"
            )
