"""The books of a sweep: all of its runs use the same records, so all of them draw on one budget per site.

Every run is charged, whichever is kept in the end: choosing among released results is post-processing and costs
nothing more. The settings of a sweep are fixed before its first run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from conf.schema.experiment import Experiment
from conf.schema.federation import ServerBudget
from conf.schema.privacy import ClientLevel, NoPrivacy, UserLevel, local_privacy
from conf.schema.site import SiteBudget
from finetuning.people import users_of
from privacy.accounting import epsilon_of, selection_epsilon
from privacy.client_level import bounded_weights, build_client_level_plan
from privacy.filter import RenyiFilter
from privacy.mechanisms import SubsampledGaussian
from privacy.plan import build_plan, default_delta
from protocol.errors import BudgetExceeded, ConfigError, PrivacyError
from server.budget import ServerBooks
from simulations.partition import published_count
from simulations.population import Population, build_population

__all__ = ["SharedBooks", "SweepCost", "shared_books"]

_STRIDE, _STRIDES = 1.02, 400


@dataclass(frozen=True)
class SweepCost:
    """What a sweep costs one unit, at the site where that is the most.

    `epsilon` is of all runs together, as the ledgers admit them; `epsilon_of_best` what a search would cost that drew
    the number of its runs from a Poisson distribution of mean `runs`, each run's settings at random from the sweep's,
    and told the best run alone (arXiv 2110.03620).
    """

    unit: str
    runs: int
    epsilon: float
    epsilon_of_best: float
    delta: float


@dataclass(frozen=True)
class SharedBooks:
    """Where the sites of a sweep keep their ledgers, what these may hold, and the same of the server."""

    sites: Path
    budgets: Mapping[str, SiteBudget]
    server: ServerBooks
    costs: tuple[SweepCost, ...]
    """One per protected unit; empty where nothing is protected."""

    def told(self) -> list[dict[str, Any]]:
        """Return the costs as plain JSON values."""
        return [vars(cost) for cost in self.costs]


@dataclass(frozen=True)
class _Asked:
    """What one run asks of one unit: given δ, its mechanism."""

    delta: float
    budget: float | None
    mechanism: Callable[[float], SubsampledGaussian]


def shared_books(
    experiments: Sequence[Experiment],
    folder: Path,
    population_of: Callable[[Experiment], Population] = build_population,
) -> SharedBooks:
    """Return the books for the runs of a sweep, before the first of them.

    A site's budget is `federation.site_epsilon`, where it is given, and else what all runs together need.

    Raises:
        BudgetExceeded: the runs together cost more than the configured budget.
        ConfigError: the runs protect different units inside the sites, which no one budget can count.
    """
    populations: dict[str, Population] = {}
    units: set[str] = set()
    sites: dict[str, list[_Asked]] = {}
    server: list[_Asked] = []
    for experiment in experiments:
        key = f"{experiment.seed}|{experiment.data.model_dump_json()}"
        if key not in populations:
            populations[key] = population_of(experiment)
        population = populations[key]
        local = local_privacy(experiment.privacy)
        if not isinstance(local, NoPrivacy):
            units.add("user" if isinstance(local, UserLevel) else "record")
            for name, asked in _asked_of_sites(experiment, population):
                sites.setdefault(name, []).append(asked)
        if isinstance(experiment.privacy, ClientLevel):
            server.append(_asked_of_server(experiment, population, experiment.privacy))
    if len(units) > 1:
        raise ConfigError(
            f"the sweep protects {' and '.join(sorted(units))}s: a site's budget counts one unit; sweep over "
            "privacy=example_level and privacy=user_level one after the other, or without -m"
        )
    unit: Literal["record", "user"] = "user" if "user" in units else "record"
    priced = {name: _priced(asked, unit, f"federation.site_epsilon, at {name}") for name, asked in sites.items()}
    budgets = {
        name: SiteBudget(unit=unit, epsilon=epsilon, delta=cost.delta) for name, (epsilon, cost) in priced.items()
    }
    costs = [max((cost for _, cost in priced.values()), key=lambda cost: cost.epsilon)] if priced else []
    limit = None
    if server:
        epsilon, cost = _priced(server, "site", "federation.server_budget")
        limit, costs = ServerBudget(epsilon=epsilon, delta=cost.delta), [cost, *costs]
    return SharedBooks(folder / "sites", budgets, ServerBooks(folder / "server", limit), tuple(costs))


def _asked_of_sites(experiment: Experiment, population: Population) -> Iterable[tuple[str, _Asked]]:
    local, federation = local_privacy(experiment.privacy), experiment.federation
    if isinstance(local, NoPrivacy):
        return
    for name, rows in population.parts.items():
        users = users_of(rows, experiment.data.user_column) if isinstance(local, UserLevel) else None
        published = published_count(users or len(rows))

        def mechanism(delta: float, published: int = published) -> SubsampledGaussian:
            plan = build_plan(
                local,
                federation.local,
                rounds=federation.rounds,
                published_units=published,
                num_units=published,
                site_delta=delta,
            )
            return plan.whole_run

        yield name, _Asked(local.delta or default_delta(published), federation.site_epsilon, mechanism)


def _asked_of_server(experiment: Experiment, population: Population, privacy: ClientLevel) -> _Asked:
    counts = {name: published_count(len(rows)) for name, rows in population.parts.items()}
    weights = bounded_weights(counts, experiment.strategy.weights, privacy.max_weight)
    budget = experiment.federation.server_budget

    def mechanism(delta: float) -> SubsampledGaussian:
        asked = privacy.model_copy(update={"delta": delta})
        return build_client_level_plan(asked, experiment.federation, weights).whole_run

    if budget is not None:
        return _Asked(budget.delta, budget.epsilon, mechanism)
    return _Asked(privacy.delta or default_delta(len(weights)), None, mechanism)


def _priced(asked: Sequence[_Asked], unit: str, setting: str) -> tuple[float, SweepCost]:
    """Return the budget of one ledger, and what all runs cost that are booked on it, at the smallest δ of any.

    A second run is admitted by a filter (privacy/ledger/admission.py), so the budget must satisfy its rule.
    """
    delta = min(each.delta for each in asked)
    runs = [each.mechanism(delta) for each in asked]
    given = [each.budget for each in asked if each.budget is not None]
    needed = _admitting(runs, delta)
    budget = min(given) if given else needed
    charged = epsilon_of(runs, delta) if len(runs) == 1 else RenyiFilter(budget, delta).epsilon_of(runs)
    if charged > budget * (1 + 1e-9):
        raise BudgetExceeded(
            f"the {len(runs)} runs of this sweep together need ε={needed:.3g} at δ={delta:.3g}, above the {budget:g} "
            f"of {setting}: every run on the same records is charged; raise it, or ask for fewer runs or more noise"
        )
    best = selection_epsilon([runs[0]], delta, mean_trials=len(runs), alternatives=[[run] for run in runs[1:]])
    return budget, SweepCost(unit, len(runs), charged, best, delta)


def _admitting(runs: Sequence[SubsampledGaussian], delta: float) -> float:
    """Return a budget, not much larger than needed, under which the ledger admits all runs."""
    epsilon = epsilon_of(runs, delta)
    if len(runs) == 1:
        return epsilon
    tried = (epsilon * _STRIDE**step for step in range(_STRIDES))
    return next((each for each in tried if _admits(each, delta, runs)), epsilon * _STRIDE**_STRIDES)


def _admits(epsilon: float, delta: float, runs: Sequence[SubsampledGaussian]) -> bool:
    try:
        return RenyiFilter(epsilon, delta).epsilon_of(runs) <= epsilon
    except PrivacyError:  # too small a budget for any adaptive choice
        return False
