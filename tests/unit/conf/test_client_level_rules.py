"""What client-level privacy goes with, and what it does not: each refusal names the value and the fix."""

import re
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest

from conf.compose import CONFIG_DIRECTORY, InvalidConfiguration, compose_experiment
from conf.schema import strategy as schema
from conf.schema.privacy import ClientLevel
from conf.schema.rules import LINEAR_STRATEGIES, client_level_needs_a_sum, warnings_for
from privacy.forecast import client_outlook
from strategies.build import build_strategy

POISSON = "federation.cohort_sampling=poisson"


@pytest.mark.parametrize(
    "overrides",
    [
        ("privacy=client_level", POISSON, "federation.cohort_size=2"),
        ("privacy=client_level", "+privacy.clipping.quantile=0.8", "privacy.clipping.kind=adaptive"),
        ("privacy=client_level", "privacy.local.kind=example_level", "+privacy.local.target_epsilon=4"),
        ("privacy=client_level_banded", "privacy.noise.bands=2", "privacy.noise.min_separation=2"),
    ],
)
def test_legal_combinations(overrides: tuple[str, ...]) -> None:
    assert compose_experiment(overrides).privacy.kind == "client_level"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            (POISSON, "federation.cohort_size=2"),
            r"poisson amplifies client-level privacy only, not privacy=example_level",
        ),
        (("privacy=client_level", POISSON), r"poisson needs federation.cohort_size, the expected number"),
        (
            ("privacy=client_level_tree", POISSON, "federation.cohort_size=2"),
            r"poisson needs privacy.noise.kind=independent, not tree",
        ),
        (
            (
                "privacy=client_level",
                POISSON,
                "federation.cohort_size=2",
                "privacy.local.kind=example_level",
                "+privacy.local.target_epsilon=4",
            ),
            r"poisson with privacy.local.kind=example_level: the sites' own statements would tell",
        ),
        (
            ("privacy=client_level_banded", "privacy.noise.bands=5", "privacy.noise.min_separation=2"),
            r"privacy.noise.bands=5 is above privacy.noise.min_separation=2; use at most 2 bands",
        ),
        (
            (
                "privacy=client_level",
                "privacy.local.kind=example_level",
                "+privacy.local.target_epsilon=4",
                "+privacy.local.loss_noise_multiplier=10",
            ),
            r"local.loss_noise_multiplier=10 must be null under client_level",
        ),
        (
            ("privacy=client_level_blt", "privacy.clipping.kind=adaptive"),
            r"privacy.clipping.kind=adaptive moves the clip norm, and privacy.noise.kind=blt needs the same one",
        ),
    ],
)
def test_illegal_combinations(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(InvalidConfiguration, match=problem):
        compose_experiment(overrides)


def test_client_level_needs_a_sum() -> None:
    experiment = compose_experiment(["privacy=client_level"])
    median = SimpleNamespace(privacy=experiment.privacy, strategy=SimpleNamespace(kind="median"))
    problem = client_level_needs_a_sum(median)  # type: ignore[arg-type]
    assert problem == (
        f"privacy=client_level needs a strategy that sums updates ({', '.join(LINEAR_STRATEGIES)}), not median; "
        "use strategy=ffa_lora"
    )
    assert client_level_needs_a_sum(experiment) is None


def test_the_linear_strategies_are_those_that_say_so() -> None:
    variants = typing.get_args(typing.get_args(schema.Strategy)[0])
    linear = {variant.model_fields["kind"].default for variant in variants if build_strategy(variant()).is_linear}
    assert linear == set(LINEAR_STRATEGIES)


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (("privacy=client_level", "privacy.target_epsilon=null"), "privacy"),
        (("privacy=client_level", "privacy.local.kind=example_level"), r"privacy\.local"),
    ],
)
def test_each_promise_names_its_own_path(overrides: tuple[str, ...], path: str) -> None:
    message = rf"{path}: neither is set; give exactly one of {path}.target_epsilon and {path}.noise_multiplier"
    with pytest.raises(InvalidConfiguration, match=message):
        compose_experiment(overrides)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (
            ("privacy=client_level", "data.partition.sites=[a,b,c,d]"),
            "with 4 sites: each hides among 3 others",
        ),
        (("privacy.delta=0.01",), "privacy.delta=0.01: the promise may fail that often; 0.001 or less"),
        (("privacy=client_level_tree",), "with all sites in every round: no site rests, .* half of the sites"),
    ],
)
def test_what_is_allowed_and_hopeless_is_said(overrides: tuple[str, ...], warning: str) -> None:
    assert any(re.search(warning, told) for told in warnings_for(compose_experiment(overrides)))


def test_the_defaults_need_no_such_warning() -> None:
    assert warnings_for(compose_experiment(())) == []
    rested = warnings_for(compose_experiment(("privacy=client_level_tree", "federation.cohort_size=2")))
    assert not any("no site rests" in told for told in rested)


@pytest.mark.parametrize(
    "path", sorted((CONFIG_DIRECTORY / "privacy").glob("client_level*.yaml")), ids=lambda p: p.stem
)
@pytest.mark.parametrize("cohort", ["null", "2", "1"])
def test_every_client_level_default_is_feasible_with_the_default_federation(path: Path, cohort: str) -> None:
    experiment = compose_experiment([f"privacy={path.stem}", f"federation.cohort_size={cohort}"])
    assert isinstance(experiment.privacy, ClientLevel)
    outlook = client_outlook(experiment.privacy, experiment.federation, dict.fromkeys("abcd", 1.0), 1000)
    assert not outlook.problem
    assert outlook.epsilon is not None
    assert 0.999 * 8 <= outlook.epsilon <= 8
