"""Every number of every configuration has a bound on both sides, and the values that overflow are refused."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

import conf.schema
from conf.compose import InvalidConfiguration, compose_experiment
from conf.schema.base import Frozen
from conf.schema.federation import SGD, AdamW
from conf.schema.rules import warnings_for

LOW, HIGH = {"ge", "gt"}, {"le", "lt"}


def schema_classes(root: type[BaseModel] = Frozen) -> Iterator[type[BaseModel]]:
    for each in root.__subclasses__():
        yield each
        yield from schema_classes(each)


def is_number(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return False
    return annotation in (int, float) or any(is_number(each) for each in get_args(annotation))


def bounds(metadata: Any, annotation: Any = None) -> set[str]:
    found = {name for each in metadata for name in LOW | HIGH if getattr(each, name, None) is not None}
    for each in metadata:
        found |= bounds(getattr(each, "metadata", ()))
    if get_origin(annotation) is Annotated:
        found |= bounds(annotation.__metadata__)
    for each in get_args(annotation):
        found |= bounds((), each)
    return found


def test_every_number_is_bounded_on_both_sides() -> None:
    for module in pkgutil.iter_modules(conf.schema.__path__):
        importlib.import_module(f"conf.schema.{module.name}")
    numbers = [
        (model.__name__, name, bounds(field.metadata, field.annotation))
        for model in schema_classes()
        if model.__module__.startswith("conf.schema.")
        for name, field in model.model_fields.items()
        if is_number(field.annotation)
    ]
    assert len(numbers) > 90
    assert [(model, name) for model, name, found in numbers if not found & LOW or not found & HIGH] == []


@pytest.mark.parametrize(
    ("override", "bound"),
    [
        ("federation.local.optimizer.weight_decay=1e300", "less than or equal to 1000"),
        ("federation.local.optimizer.learning_rate=1e-300", "greater than or equal to 0.000000000001"),
        ("federation.local.expected_batch_size=1e300", "less than or equal to 1000000000"),
        ("federation.site_epsilon=1e300", "less than or equal to 1000000"),
        ("privacy.target_epsilon=1e-300", "greater than or equal to 0.000001"),
        ("robust={kind:norm_bound,max_norm:1e300}", "less than or equal to 1000000000"),
    ],
)
def test_a_value_that_overflows_is_refused_with_its_bound(override: str, bound: str) -> None:
    group = override.replace("robust={kind:norm_bound,", "strategy.robust={kind:norm_bound,")
    with pytest.raises(InvalidConfiguration, match=bound) as caught:
        compose_experiment([group])
    typed = override.rpartition("=")[2].rpartition(":")[2].rstrip("}")
    assert typed in str(caught.value), "the value is not named"


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_a_step_takes_no_more_off_a_value_than_there_is(optimizer: Any) -> None:
    assert optimizer(learning_rate=0.5, weight_decay=2.0).weight_decay == 2.0
    with pytest.raises(ValueError, match=r"learning_rate=0.5 x weight_decay=3 must be at most 1, .* at most 2"):
        optimizer(learning_rate=0.5, weight_decay=3.0)


@pytest.mark.parametrize(
    ("override", "warned"),
    [
        ("federation.local.optimizer.learning_rate=4000", True),
        ("federation.local.optimizer.learning_rate=8", False),
        ("federation.local.optimizer={kind:adamw,learning_rate:0.5}", True),
        ("strategy.server_optimizer={kind:fedadam,learning_rate:3}", True),
        ("server_optimizer=adam", False),
    ],
)
def test_a_rate_that_trains_nothing_is_warned_about(override: str, warned: bool) -> None:
    told = [each for each in warnings_for(compose_experiment([override])) if "far above" in each]
    assert bool(told) == warned
    if warned:
        assert override.partition("=")[0].split("{")[0].split("=")[0].removesuffix(".learning_rate") in told[0]
