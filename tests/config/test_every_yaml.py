"""Every YAML under conf/ is discovered, composes, and validates; every schema variant has one."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from conf.compose import CONFIG_DIRECTORY, compose_experiment
from conf.schema.objective import Objective
from conf.schema.privacy import Privacy
from conf.schema.robust import Robust
from conf.schema.server_optimizer import ServerOptimizer
from conf.schema.strategy import Strategy
from conf.schema.task import Task
from conf.schema.wire import Quantization

MEMBERS = sorted(path.relative_to(CONFIG_DIRECTORY) for path in CONFIG_DIRECTORY.glob("*/*.yaml"))

# What a person has to give with a member whose YAML leaves a blank or that goes with another group.
COMPANIONS = {
    "model/causal_lm": ["model.path=some/model"],
    "model/encoder": ["model.path=some/model"],
    "task/classification": ["data=csv_labelled", "data.source.path=rows.csv", "task.labels=[no,yes]"],
    "data/csv_labelled": ["data.source.path=rows.csv", "task=classification", "task.labels=[no,yes]"],
    "objective/qfedavg": ["privacy.loss_noise_multiplier=10"],
    "peft/head": ["task=classification", "data=csv_labelled", "data.source.path=rows.csv", "task.labels=[no,yes]"],
    "peft/dora": ["strategy=fedit", "privacy.per_example_gradients=one_by_one"],
}


def test_there_are_yamls_to_check() -> None:
    assert len(MEMBERS) >= 20
    assert CONFIG_DIRECTORY / "config.yaml" in CONFIG_DIRECTORY.glob("*.yaml")


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_member_composes_and_validates(member: Path) -> None:
    group, name = member.parent.name, member.stem
    blanks = ["data.source.path=rows.jsonl"] if group == "data" else []
    overrides = [f"{group}={name}", *COMPANIONS.get(f"{group}/{name}", blanks)]
    if name == "clinics":
        overrides = [f"{group}={name}"]
    experiment = compose_experiment(overrides)
    assert len(experiment.digest) == 64


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_member_says_what_it_is_for(member: Path) -> None:
    lines = (CONFIG_DIRECTORY / member).read_text().splitlines()
    comment = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert comment.startswith("# ")
    assert comment.endswith(".")


UNIONS = [
    ("strategy", Strategy),
    ("server_optimizer", ServerOptimizer),
    ("objective", Objective),
    ("robust", Robust),
    ("privacy", Privacy),
    ("task", Task),
    ("quantization", Quantization),
]


@pytest.mark.parametrize(("group", "union"), UNIONS)
def test_every_variant_has_a_yaml(group: str, union: object) -> None:
    kinds = {variant.model_fields["kind"].default for variant in get_args(get_args(union)[0])}
    stored = {yaml.safe_load(path.read_text())["kind"] for path in (CONFIG_DIRECTORY / group).glob("*.yaml")}
    assert kinds == stored
