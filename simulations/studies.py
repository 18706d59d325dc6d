"""Comparisons that need several runs. Every member of a study sees the same held-out records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema.experiment import Experiment
from conf.schema.federation import AdamW
from conf.schema.privacy import NoPrivacy
from server.events import Observer
from server.summary import tuned_quality
from simulations.population import Population, build_population
from simulations.simulate import Simulated, simulate

__all__ = ["OPEN_OPTIMIZER", "Baseline", "Member", "baseline_members", "run_baselines"]

OPEN_OPTIMIZER = AdamW(learning_rate=8e-3)
"""Of the members without privacy. Clipped and noised gradients want plain SGD at a high rate, exact ones do not."""


@dataclass(frozen=True)
class Member:
    """One run of a study."""

    name: str
    label: str
    experiment: Experiment
    population: Population


@dataclass(frozen=True)
class Baseline:
    """One line of the comparison; `value` is the headline metric on the pooled held-out records."""

    label: str
    metric: str
    value: float
    epsilon: float | None
    groups: dict[str, float]


def baseline_members(experiment: Experiment, population: Population) -> Iterator[Member]:
    """Yield the runs of `cloister study baselines`: each site alone, federated and centralized, private and not."""
    open_experiment = _without_privacy(experiment)
    private = experiment.privacy.kind != "none"
    for name, rows in population.parts.items():
        label = f"{name} alone" + (", private" if private else "")
        yield Member(f"alone-{name}", label, _single_site(experiment), Population({name: rows}, population.heldout))
    if private:
        yield Member("federated-private", "federated, private", experiment, population)
    yield Member("federated-open", "federated, not private", open_experiment, population)
    pooled = [row for rows in population.parts.values() for row in rows]
    yield Member(
        "centralized-open",
        "centralized, not private",
        _single_site(_with_batch(open_experiment, len(population.parts))),
        Population({"all-records": pooled}, population.heldout),
    )


def run_baselines(
    experiment: Experiment, path: Path, observers_of: Callable[[Member], Sequence[Observer]]
) -> list[Baseline]:
    """Run every member below `path` and return the comparison, the base first."""
    population = build_population(experiment)
    runs = [
        (member, simulate(member.experiment, path / member.name, observers_of(member), member.population))
        for member in baseline_members(experiment, population)
    ]
    first = runs[0][1].summary
    base = Baseline(
        "base, not fine-tuned", first["final"]["metric"], first["final"]["base"], None, first["final"]["base_groups"]
    )
    lines = [base, *(_line(member, run) for member, run in runs)]
    alone = [line for line in lines if " alone" in line.label]
    mean = Baseline("mean site alone", base.metric, sum(a.value for a in alone) / len(alone), alone[0].epsilon, {})
    position = 1 + len(alone)
    return [*lines[:position], mean, *lines[position:]]


def _line(member: Member, run: Simulated) -> Baseline:
    final: dict[str, Any] = run.summary["final"]
    value, groups = tuned_quality(final)
    return Baseline(member.label, final["metric"], value, run.summary["privacy"]["epsilon"], dict(groups))


def _without_privacy(experiment: Experiment) -> Experiment:
    """Return the experiment as one would run it without noise; the private optimizer would make a straw man of it."""
    local = experiment.federation.local.model_copy(update={"optimizer": OPEN_OPTIMIZER})
    federation = experiment.federation.model_copy(update={"local": local})
    return experiment.model_copy(update={"privacy": NoPrivacy(), "federation": federation})


def _single_site(experiment: Experiment) -> Experiment:
    federation = experiment.federation.model_copy(update={"cohort_size": None, "min_replies": 1})
    return experiment.model_copy(update={"federation": federation})


def _with_batch(experiment: Experiment, sites: int) -> Experiment:
    """One place sees as many records per step as all sites together did."""
    local = experiment.federation.local
    local = local.model_copy(update={"expected_batch_size": local.expected_batch_size * sites})
    return experiment.model_copy(update={"federation": experiment.federation.model_copy(update={"local": local})})
