"""What every strategy promises, asked of every strategy that can be configured."""

import math
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from conf.schema import strategy as schema
from protocol.tensors import NamedTensors
from strategies.base import Aggregator, Contribution, Strategy
from strategies.build import STRATEGIES, build_strategy

VARIANTS: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(schema.Strategy)[0])
STRATEGIES_BUILT = [build_strategy(variant()) for variant in VARIANTS]  # type: ignore[call-arg, arg-type]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES_BUILT, ids=[each.__name__ for each in VARIANTS])
NAMES = frozenset(
    f"base_model.model.{name}"
    for name in (
        "layers.0.q_proj.lora_A.weight",
        "layers.0.q_proj.lora_B.weight",
        "layers.1.down_proj.lora_A.weight",
        "layers.1.down_proj.lora_B.weight",
        "layers.1.down_proj.lora_magnitude_vector",
        "embed_tokens.lora_embedding_A",
        "embed_tokens.lora_embedding_B",
        "score.weight",
    )
)


def random_tensors(seed: int, names: frozenset[str] = NAMES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 5, generator=generator) for name in sorted(names)}


def combined(strategy: Strategy, updates: list[NamedTensors], weights: list[float]) -> NamedTensors:
    aggregator = fresh(strategy)
    for update, weight in zip(updates, weights, strict=True):
        aggregator.accumulate(Contribution(update, weight))
    return aggregator.result()


def fresh(strategy: Strategy) -> Aggregator:
    adapter = random_tensors(1)
    return strategy.server.aggregator(adapter, strategy.server.init(adapter))


def stepped(strategy: Strategy, adapter: NamedTensors, update: NamedTensors) -> NamedTensors:
    return strategy.server.step(adapter, update, strategy.server.init(adapter))[0]


def assert_near(left: NamedTensors, right: NamedTensors) -> None:
    assert left.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-6)


def test_there_are_strategies_and_each_variant_is_built() -> None:
    assert len(VARIANTS) >= 2
    assert set(VARIANTS) == set(STRATEGIES)
    assert all(build_strategy(variant()) is not build_strategy(variant()) for variant in VARIANTS)  # type: ignore[call-arg, arg-type]


@every_strategy
def test_it_trains_something_that_exists(strategy: Strategy) -> None:
    trained = strategy.trained(NAMES, 1)
    assert trained
    assert trained <= NAMES
    assert strategy.trained(NAMES, 1) == trained
    assert all(name in trained for name in NAMES if "score" in name or "magnitude" in name)
    assert strategy.trained(frozenset(), 1) == frozenset()


@every_strategy
def test_every_adapted_layer_keeps_a_factor_that_can_leave_zero(strategy: Strategy) -> None:
    """PEFT zeroes lora_B and lora_embedding_A; with the other factor alone a layer would never move."""
    trained = strategy.trained(NAMES, 1)
    assert all(name in trained for name in NAMES if ".lora_B." in name or "lora_embedding_A" in name)


@every_strategy
@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 999), st.floats(1e-3, 1e6)), min_size=1, max_size=6))
def test_a_linear_strategy_is_a_weighted_sum(strategy: Strategy, replies: list[tuple[int, float]]) -> None:
    if not strategy.is_linear:
        pytest.skip("makes no such promise")
    names = strategy.trained(NAMES, 1)
    updates, weights = [random_tensors(seed, names) for seed, _ in replies], [weight for _, weight in replies]
    shares = [weight / math.fsum(weights) for weight in weights]
    expected = {
        name: sum((share * u[name].double() for share, u in zip(shares, updates, strict=True)), torch.zeros(1)).float()
        for name in names
    }
    assert_near(combined(strategy, updates, weights), expected)


@every_strategy
def test_the_order_of_arrival_does_not_show(strategy: Strategy) -> None:
    names = strategy.trained(NAMES, 1)
    updates, weights = [random_tensors(seed, names) for seed in range(7)], [1.0, 7.0, 1e-3, 500.0, 3.0, 2.0, 0.1]
    forward, backward = (combined(strategy, updates[::way], weights[::way]) for way in (1, -1))
    for name in names:
        torch.testing.assert_close(forward[name], backward[name], rtol=2e-7, atol=1e-9)


@every_strategy
@pytest.mark.parametrize("weight", [1e-9, 1.0, 12345.0])
def test_one_update_is_the_result(strategy: Strategy, weight: float) -> None:
    update = random_tensors(3, strategy.trained(NAMES, 1))
    result = combined(strategy, [update], [weight])
    assert_near(result, update)
    assert all(tensor.dtype == torch.float32 for tensor in result.values())


@every_strategy
def test_equal_weights_of_any_size_are_the_same(strategy: Strategy) -> None:
    updates = [random_tensors(seed, strategy.trained(NAMES, 1)) for seed in range(3)]
    assert_near(combined(strategy, updates, [1.0] * 3), combined(strategy, updates, [250.0] * 3))


@every_strategy
def test_aggregators_share_nothing_and_keep_their_inputs(strategy: Strategy) -> None:
    update = random_tensors(3, strategy.trained(NAMES, 1))
    combined(strategy, [random_tensors(9, strategy.trained(NAMES, 1))], [50.0])
    given_to_it = {name: tensor.clone() for name, tensor in update.items()}
    aggregator = fresh(strategy)
    aggregator.accumulate(Contribution(given_to_it, 2.0))
    for tensor in given_to_it.values():
        tensor.zero_()
    assert_near(aggregator.result(), update)
    assert_near(aggregator.result(), update)


@every_strategy
def test_a_step_adds_what_was_trained_and_keeps_the_rest(strategy: Strategy) -> None:
    adapter, names = random_tensors(1), strategy.trained(NAMES, 1)
    update = random_tensors(2, names)
    after = stepped(strategy, adapter, update)
    assert after.keys() == adapter.keys()
    assert_near(after, {name: adapter[name] + update[name] if name in names else adapter[name] for name in NAMES})
    assert_near(adapter, random_tensors(1))


@every_strategy
def test_a_zero_update_changes_nothing(strategy: Strategy) -> None:
    adapter = random_tensors(1)
    zero = {name: torch.zeros(3, 5) for name in strategy.trained(NAMES, 1)}
    after = stepped(strategy, adapter, combined(strategy, [zero, zero], [1.0, 2.0]))
    assert all(torch.equal(after[name], adapter[name]) for name in NAMES)


@every_strategy
def test_there_is_no_result_of_nothing(strategy: Strategy) -> None:
    with pytest.raises(ValueError, match="there is no mean of no updates"):
        fresh(strategy).result()


@every_strategy
@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_is_positive_and_finite(strategy: Strategy, weight: float) -> None:
    aggregator = fresh(strategy)
    with pytest.raises(ValueError, match=rf"weight={weight} must be positive and finite"):
        aggregator.accumulate(Contribution(random_tensors(0), weight))
