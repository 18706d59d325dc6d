"""A small real experiment, observed by the doctor; and a way to plant a fault that only a test has."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from privacy.doctor.subject import Subject
from simulations.doctor import observe_site
from simulations.population import Population, build_population

RECORDS, USERS = 60, 20
SETTINGS = (
    "model=causal_lm",
    "strategy=fedit",
    "peft.rank=4",
    "data=jsonl_text",
    "data.split_column=kind",
    "data.partition.sites=1",
    "federation.rounds=2",
    "federation.local.steps=3",
    "federation.local.expected_batch_size=8",
    "privacy.batch_cap=null",
)
WORDS = "sore throat fever pain stairs pulse normal prince silence phone battery week card transfer great value".split()


@pytest.fixture(scope="session")
def experiment(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """One site with 60 records of 20 users; the adapter of a tiny Llama."""
    rows = [
        {"text": " ".join(WORDS[(n * 7 + k * k) % len(WORDS)] for k in range(2 + n % 5)), "user": f"u{n % USERS}"}
        for n in range(RECORDS)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "kind": "train"}) + "\n" for row in rows))
    held = json.dumps({"text": "sore throat", "user": "u0", "kind": "heldout"})
    path.write_text(path.read_text() + held + "\n")
    return compose_experiment([*SETTINGS, f"model.path={tiny_model('llama')}", f"data.source.path={path}"])


@pytest.fixture(scope="session")
def population(experiment: Experiment) -> Population:
    return build_population(experiment)


@pytest.fixture
def observe(experiment: Experiment, population: Population, tmp_path: Path) -> Callable[[], Subject]:
    """Return what the doctor observes of the real code, as it is when called."""
    return lambda: observe_site(experiment, population.parts, tmp_path)
