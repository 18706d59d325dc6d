"""Simulated sites: real `client.site.Site` objects over the parts of one data set."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from client.site import Site
from conf.compose import compose_experiment, parse_experiment
from conf.schema.experiment import Experiment
from conf.schema.paths import expanded
from conf.schema.privacy import ExampleLevel, NoPrivacy, UserLevel, local_privacy
from conf.schema.site import SiteBudget, SiteFile, SitePolicy, SiteRuntime
from finetuning.datasets import check_columns, read_rows, rows_in_use, split_rows
from finetuning.people import people_of, users_of
from finetuning.row_checks import RowFault, first_fault
from finetuning.rows import Row
from privacy.plan import build_plan, default_delta
from protocol.errors import ConfigError, DataError
from protocol.refusals import sentence
from simulations.partition import partition, published_count

__all__ = [
    "Population",
    "build_population",
    "check_simulated_nodes",
    "nth_site",
    "simulated_site",
    "site_file",
]


_LEAST_EPSILON = 1e-6


@dataclass(frozen=True)
class Population:
    """The training records of each simulated site, and the held-out records that the server may see."""

    parts: Mapping[str, Sequence[Row]]
    heldout: Sequence[Row]

    def sites(
        self, experiment: Experiment, state: Path, budgets: Mapping[str, SiteBudget] | None = None
    ) -> dict[str, Site]:
        """Return a site per part, in the order of their names, each with its own state directory under `state`.

        `budgets` are those of a sweep, by site; without them a site's budget is what the experiment says.
        """
        given = {} if isinstance(local_privacy(experiment.privacy), NoPrivacy) else budgets or {}
        return {
            name: Site(
                _with_budget(
                    _ranked(
                        site_file(
                            experiment, name, len(rows), state / name, users_of(rows, experiment.data.user_column)
                        ),
                        experiment,
                        position,
                    ),
                    given.get(name),
                ),
                rows=_given(rows),
                simulated=True,
            )
            for position, (name, rows) in enumerate(self.parts.items())
        }


def build_population(experiment: Experiment) -> Population:
    """Return the sites' records and the held-out ones, as the experiment's data group describes them.

    All records are checked before any is held out or dealt: every seed and partition stops at the same one.

    Raises:
        DataError: naming the file and line, the column, and the site that is wrong.
    """
    rows = read_rows(experiment.data.source)
    check_columns(rows, experiment.data.columns)
    column = experiment.data.user_column
    if column is not None and isinstance(local_privacy(experiment.privacy), UserLevel):
        people_of(rows, column)  # before the split: the seed must not decide whether nobody is noticed
    fault = first_fault(_rows_of_sites(rows, experiment), experiment.data.columns, experiment.task.labels)
    if fault is not None:
        raise DataError(_holder(fault, rows, experiment) + fault.sentence)
    return _dealt(rows, experiment)


def _dealt(rows: Sequence[Row], experiment: Experiment) -> Population:
    train, heldout = split_rows(rows, experiment.data, experiment.seed)
    return Population(partition(train, experiment.data.partition, experiment.seed), heldout)


def _rows_of_sites(rows: Sequence[Row], experiment: Experiment) -> list[Row]:
    """Return the rows that some seed could use; those of a natural key's other sites are not looked at."""
    used, division = rows_in_use(rows, experiment.data), experiment.data.partition
    if division.kind != "natural_key" or division.sites is None:
        return used
    wanted = set(map(division.site_of, division.sites))
    return [row for row in used if division.site_of(row.get(division.key, "")) in wanted]


def _holder(fault: RowFault, rows: Sequence[Row], experiment: Experiment) -> str:
    """Return who holds the row, as the start of a sentence; nothing where nobody does."""
    try:
        population = _dealt(rows, experiment)
    except DataError:  # the row's own fault is the one to mend first
        return ""
    if any(row is fault.row for row in population.heldout):
        return "held-out records: "
    holders = (name for name, part in population.parts.items() if any(row is fault.row for row in part))
    return next((f"site {name}: " for name in holders), "")


def site_file(experiment: Experiment, name: str, records: int, state: Path, users: int | None = None) -> SiteFile:
    """Return the site file of a simulated site. Its policy agrees to whatever the simulation's owner configured."""
    published, published_users = published_count(records), None if users is None else published_count(users)
    privacy = local_privacy(experiment.privacy)
    return SiteFile(
        name=name,
        published_records=published,
        published_users=published_users,
        data=experiment.data.model_copy(update={"max_records": None}),  # drawn before the sites were made
        budget=None if isinstance(privacy, NoPrivacy) else _budget(experiment, privacy, published, published_users),
        policy=SitePolicy(
            dtypes=(experiment.model.dtype,),
            require_approval=False,
            max_rounds=100_000,
            max_steps_per_round=10_000,
            max_rank=1024,
            allow_no_privacy=True,
            trust_server_noise=True,
            release_training_loss=experiment.federation.release_training_loss,
        ),
        runtime=SiteRuntime(
            device=experiment.runtime.device,
            threads=experiment.runtime.threads,
            micro_batch_tokens=experiment.runtime.micro_batch_tokens,
            gradient_checkpointing=experiment.runtime.gradient_checkpointing,
        ),
        model_path=experiment.model.path,
        task=experiment.task,
        state_directory=str(state),
    )


def _ranked(file: SiteFile, experiment: Experiment, position: int) -> SiteFile:
    """Return the file of the site at `position` with its rank of `federation.site_ranks`."""
    ranks = experiment.federation.site_ranks
    return file if ranks is None else file.model_copy(update={"trained_rank": ranks[position % len(ranks)]})


def _budget(
    experiment: Experiment, privacy: ExampleLevel | UserLevel, records: int, users: int | None
) -> SiteBudget | None:
    """Return the budget that is configured, or what this run needs; None without a count of the protected units."""
    federation, unit = experiment.federation, "user" if isinstance(privacy, UserLevel) else "record"
    published = users if isinstance(privacy, UserLevel) else records
    if published is None:
        return None
    delta = privacy.delta if privacy.delta is not None else default_delta(published)
    epsilon = federation.site_epsilon or privacy.target_epsilon
    if epsilon is None:
        plan = build_plan(
            privacy, federation.local, rounds=federation.rounds, published_units=published, num_units=published
        )
        epsilon = plan.epsilon([plan.whole_run])
    # Noise so large that its ε rounds to nothing has a budget all the same: the least that a site can state.
    return SiteBudget(unit=unit, epsilon=max(epsilon, _LEAST_EPSILON), delta=delta)


def _with_budget(file: SiteFile, budget: SiteBudget | None) -> SiteFile:
    return file if budget is None else file.model_copy(update={"budget": budget})


def simulated_site(context: Context) -> Site:
    """Return the simulated site of a node of Flower's simulation engine.

    Raises:
        ConfigError: outside of that engine. A real node has its own site file; a server must never be able to name a
            data set on it through the run's configuration.
    """
    if not _inside_flower_simulation():
        raise ConfigError(sentence("no_site"))
    stored, overrides = str(context.run_config.get("experiment", "")), str(context.run_config.get("overrides", ""))
    experiment = parse_experiment(stored) if stored else compose_experiment(shlex.split(overrides))
    position, nodes = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    return nth_site(experiment, position, nodes, _scratch(context.run_id))


def nth_site(experiment: Experiment, position: int, nodes: int, state: Path) -> Site:
    """Return the site of one of Flower's simulated nodes: node n is the n-th site in the order of names.

    The population is read once per process.

    Raises:
        ConfigError: the engine does not simulate one node per site.
    """
    sites = _sites(experiment.canonical_json(), state)
    _check_nodes(nodes, len(sites))
    return sites[position]


def check_simulated_nodes(experiment: Experiment, nodes: int) -> None:
    """Refuse to train a part of the sites without anybody having said so.

    Raises:
        ConfigError: Flower's engine simulates more or fewer nodes than the experiment has sites.
    """
    _check_nodes(nodes, len(build_population(experiment).parts))


def _check_nodes(nodes: int, sites: int) -> None:
    if nodes != sites:
        raise ConfigError(
            f"Flower simulates {nodes} nodes, the experiment has {sites} sites; start it with: "
            f'flwr run . --federation-config "num-supernodes={sites}"'
        )


@lru_cache(maxsize=2)
def _sites(experiment_json: str, state: Path) -> tuple[Site, ...]:
    experiment = parse_experiment(experiment_json)
    return tuple(build_population(experiment).sites(experiment, state).values())


@lru_cache(maxsize=2)
def _scratch(run_id: int) -> Path:
    """Return the state directory of a run on Flower's engine, shared by the engine's processes on this machine."""
    home = Path(expanded(os.environ.get("CLOISTER_HOME", "~/.cloister")))
    return home / "simulated_sites" / str(run_id)


def _inside_flower_simulation() -> bool:
    """Whether this process is a worker of Flower's engine. A SuperNode's processes never connect to Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _given(rows: Sequence[Row]) -> Callable[[], Sequence[Row]]:
    return lambda: rows
