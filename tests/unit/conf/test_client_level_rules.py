"""What client-level privacy goes with, and what it does not: each refusal names the value and the fix."""

import typing
from types import SimpleNamespace

import pytest

from conf.compose import InvalidConfiguration, compose_experiment
from conf.schema import strategy as schema
from conf.schema.rules import LINEAR_STRATEGIES, client_level_needs_a_sum
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
            ("privacy=client_level_banded", "privacy.noise.bands=5"),
            r"privacy.noise.bands=5 is above privacy.noise.min_separation=2; use at most 2 bands",
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
