"""What the schema says of a strategy decides what it may be combined with: asked of every strategy's algorithm."""

import typing

import pytest
import torch

from conf.schema import strategy as schema
from conf.schema.federation import LocalTraining
from conf.schema.server_optimizer import FedAvgM
from protocol.tensors import NamedTensors, add
from strategies.base import LocalStart
from strategies.build import build_strategy

VARIANTS: tuple[typing.Any, ...] = typing.get_args(typing.get_args(schema.Strategy)[0])
ADDING = [variant for variant in VARIANTS if variant().adds]
WHOLE = [variant for variant in ADDING if variant.sends_difference]


def named(variants: list[typing.Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("variant", variants, ids=[each.__name__ for each in variants])


def random_adapter(heads: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"m.lora_A.weight": (4, 6), "m.lora_B.weight": (7, 4), "score.weight": (2, 5)}
    if heads:
        shapes |= {"m.lora_core": (heads, 4 // heads, 4 // heads), "m.lora_core_scale": (heads,)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return drawn | ({"m.lora_core_scale": torch.ones(heads)} if heads else {})


def assert_near(left: NamedTensors, right: NamedTensors) -> None:
    assert left.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-5)


def test_there_are_strategies_to_ask() -> None:
    assert len(ADDING) >= 7
    assert len(WHOLE) >= 3
    assert not any(variant().adds for variant in (schema.RoLoRA, schema.FedSVD, schema.FLoRA, schema.FlexLoRA))


@named(ADDING)
def test_momentum_meets_the_same_coordinates_in_every_round(variant: typing.Any) -> None:
    """Of two equal updates u the first moves the adapter by u, the second by u + β u, and the same tensors move."""
    strategy = build_strategy(variant(server_optimizer=FedAvgM(momentum=0.5)))
    adapter, drawn = random_adapter(variant().cores, 1), random_adapter(variant().cores, 2)
    names = strategy.uploaded(frozenset(adapter), 1)
    assert names == strategy.uploaded(frozenset(adapter), 2)
    update = {name: drawn[name] for name in names}
    once, state = strategy.server.step(adapter, update, strategy.server.init(adapter))
    twice, _ = strategy.server.step(once, update, state)
    assert_near(once, add(adapter, update))
    assert_near(twice, add(adapter, {name: 2.5 * tensor for name, tensor in update.items()}))


@named(WHOLE)
def test_an_update_that_is_said_to_be_whole_is(variant: typing.Any) -> None:
    strategy, adapter = build_strategy(variant()), random_adapter(variant().cores, 1)
    trained, uploaded = (chosen(frozenset(adapter), 1) for chosen in (strategy.trained, strategy.uploaded))
    assert trained == uploaded
    change = {name: tensor for name, tensor in random_adapter(variant().cores, 2).items() if name in trained}
    local = strategy.client.begin(LocalStart(adapter, {}, {}, trained, uploaded, LocalTraining(), 1.0))
    assert_near(local.finish(add(local.start, change)).update, change)


@named([variant for variant in ADDING if not variant.sends_difference])
def test_the_others_send_something_else(variant: typing.Any) -> None:
    sparse = {"upload_density": 0.5} if variant is schema.FLASC else {}
    strategy, adapter = build_strategy(variant(**sparse)), random_adapter(variant().cores, 1)
    trained, uploaded = (chosen(frozenset(adapter), 1) for chosen in (strategy.trained, strategy.uploaded))
    change = {name: tensor for name, tensor in random_adapter(variant().cores, 2).items() if name in trained}
    local = strategy.client.begin(LocalStart(adapter, {}, {}, trained, uploaded, LocalTraining(), 1.0))
    update = local.finish(add(local.start, change)).update
    assert update.keys() != change.keys() or any(not torch.allclose(update[name], change[name]) for name in change)
