"""A small site on the embedded base, and instructions for it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from client.site import Site
from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from conf.schema.privacy import ClientLevel
from finetuning.adapters import attach
from finetuning.models import load_base
from protocol.instructions import Instruction, InstructionHeader, ReleaseClaim, client_plan
from protocol.tensors import NamedTensors, digest
from simulations.population import Population, build_population, site_file
from strategies.build import build_strategy

SMALL = (
    "experiment=smoke",
    "federation.local.expected_batch_size=6",
    "federation.local.steps=2",
)


@pytest.fixture(scope="session")
def small() -> Callable[..., Experiment]:
    @cache  # composing takes longer than most of what is asked of a site, and the same few experiments are asked for
    def make(*overrides: str, private: bool = True) -> Experiment:
        return compose_experiment([*SMALL, "privacy.insecure_seed=5" if private else "privacy=none", *overrides])

    return make


@pytest.fixture(scope="session")
def population(small: Callable[..., Experiment]) -> Population:
    return build_population(small())


@pytest.fixture
def make_site(population: Population, tmp_path: Path) -> Callable[..., Site]:
    def make(experiment: Experiment, name: str = "harbor", rows: int = 60, state: str = "state") -> Site:
        own = population.parts[name][:rows]
        users = len({str(row["patient"]) for row in own}) if own else None
        file = site_file(experiment, name, max(len(own), 1), tmp_path / state / name, users)
        return Site(file, rows=lambda: own, simulated=True)

    return make


@pytest.fixture(scope="session")
def instruct() -> Callable[..., Instruction]:
    def make(
        experiment: Experiment,
        round_number: int = 1,
        run: str = "run",
        adapter: NamedTensors | None = None,
        release: ReleaseClaim | None = None,
    ) -> Instruction:
        adapted = attach(load_base(experiment.model, experiment.task, "cpu"), experiment.peft, experiment.task)
        start = dict(adapter if adapter is not None else adapted.initial(experiment.seed))
        trained = build_strategy(experiment.strategy).trained(frozenset(start), 1)
        plan = client_plan(experiment, run)
        header = InstructionHeader(
            round=round_number,
            plan=plan,
            plan_digest=plan.digest,
            base_digest=adapted.base.digest,
            adapter_digest=digest(start),
            clip_norm=experiment.privacy.clip_norm if isinstance(experiment.privacy, ClientLevel) else None,
            release=release,
        )
        return Instruction(header, {name: start[name] for name in trained})

    return make
