"""What every strategy promises, asked of every strategy that can be configured."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from conf.schema import strategy as schema
from conf.schema.federation import LocalTraining
from protocol.tensors import NamedTensors, add
from strategies.base import Contribution, LocalStart, Strategy
from strategies.build import STRATEGIES, build_strategy
from strategies.lora.factors import cut

from .strategies_under_test import (
    CORE_NAMES,
    CORES,
    RANK,
    STRATEGIES_BUILT,
    VARIANTS,
    ZERO_NAMES,
    adapter_of,
    assert_near,
    assert_same_effect,
    clipped,
    combined,
    contribution,
    effect,
    every_strategy,
    fresh,
    length,
    names_of,
    not_summing,
    random_tensors,
    shapes_of,
    stepped,
    summing,
    taking_ranks,
    zeros,
)


def test_there_are_strategies_and_each_variant_is_built() -> None:
    assert len(VARIANTS) >= 12
    assert set(VARIANTS) == set(STRATEGIES)
    assert all(build_strategy(variant()) is not build_strategy(variant()) for variant in VARIANTS)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize("variant", VARIANTS, ids=[each.__name__ for each in VARIANTS])
def test_the_schema_tells_the_truth_about_the_algorithm(variant: type[BaseModel]) -> None:
    """The support matrix decides before anything is built."""
    config, strategy = variant(), STRATEGIES_BUILT[VARIANTS.index(variant)]
    assert config.is_linear == strategy.is_linear  # type: ignore[attr-defined]
    assert config.takes_ranks == strategy.takes_ranks  # type: ignore[attr-defined]
    first, second = (
        {"both" if name.replace(".lora_B.", ".lora_A.") in trained else "one" for name in trained if ".lora_B." in name}
        or {"other"}
        for trained in (strategy.trained(names_of(strategy), 1), strategy.trained(names_of(strategy), 2))
    )
    if config.trains == "cores":  # type: ignore[attr-defined]
        assert config.cores > 0  # type: ignore[attr-defined]
        assert {name for name in strategy.trained(names_of(strategy), 1) if "lora" in name} >= CORE_NAMES
        assert not {name for name in strategy.trained(names_of(strategy), 1) if "lora_A" in name or "lora_B" in name}
        return
    expected = {"both": ({"both"}, {"both"}), "one": ({"one"}, {"one"}), "alternating": ({"one"}, {"other"})}
    assert (first, second) == expected[config.trains]  # type: ignore[attr-defined]


@every_strategy
@pytest.mark.parametrize("number", [1, 2])
def test_it_trains_something_that_exists(strategy: Strategy, number: int) -> None:
    trained = strategy.trained(names_of(strategy), number)
    assert trained
    assert trained <= names_of(strategy)
    assert strategy.trained(names_of(strategy), number) == trained
    assert all(name in trained for name in names_of(strategy) if "score" in name or "magnitude" in name)
    assert strategy.trained(frozenset(), number) == frozenset()


@every_strategy
@pytest.mark.parametrize("number", [1, 2])
def test_it_sends_some_of_what_it_trains(strategy: Strategy, number: int) -> None:
    trained, uploaded = strategy.trained(names_of(strategy), number), strategy.uploaded(names_of(strategy), number)
    assert uploaded <= trained
    assert strategy.downloaded(names_of(strategy), number) <= names_of(strategy)
    assert uploaded, "a site that sends nothing takes no part"


@every_strategy
def test_every_adapted_layer_keeps_a_factor_that_can_leave_zero(strategy: Strategy) -> None:
    """PEFT zeroes lora_B and lora_embedding_A; with the other factor alone a layer would never move in round 1.
    A zero core between two random factors moves too."""
    trained = strategy.trained(names_of(strategy), 1)
    movers = CORE_NAMES if CORES[id(strategy)] else ZERO_NAMES
    assert movers <= trained


@summing
@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 999), st.floats(1e-3, 1e6)), min_size=1, max_size=6))
def test_a_linear_strategy_is_a_weighted_sum(strategy: Strategy, replies: list[tuple[int, float]]) -> None:
    names = strategy.uploaded(names_of(strategy), 1)
    updates, weights = [random_tensors(strategy, seed, names) for seed, _ in replies], [weight for _, weight in replies]
    shares = [weight / math.fsum(weights) for weight in weights]
    expected = {
        name: sum((share * u[name].double() for share, u in zip(shares, updates, strict=True)), torch.zeros(1)).float()
        for name in names
    }
    assert_near(combined(strategy, updates, weights), expected)


@summing
@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 999), st.floats(0.1, 10)), min_size=2, max_size=6), st.floats(0.01, 100))
def test_one_site_changes_a_sum_by_its_clip_norm_at_most(
    strategy: Strategy, replies: list[tuple[int, float]], clip_norm: float
) -> None:
    assert strategy.sensitivity == "weighted_clip_norm"
    names = strategy.uploaded(names_of(strategy), 1)
    updates = [clipped(random_tensors(strategy, seed, names), clip_norm) for seed, _ in replies]
    weights = [weight for _, weight in replies]
    with_it, without = (
        {name: value.double() * sum(some) for name, value in combined(strategy, of, some).items()}
        for of, some in ((updates, weights), (updates[1:], weights[1:]))
    )
    assert length({name: with_it[name] - without[name] for name in names}) <= weights[0] * clip_norm * (1 + 1e-3)


@every_strategy
def test_the_step_needs_the_sum_alone_where_it_says_so(strategy: Strategy) -> None:
    """Two sites that differ, and two that agree on the mean of both: one sum, and so one next adapter."""
    names = strategy.uploaded(names_of(strategy), 1)
    mean, apart = (random_tensors(strategy, seed, names) for seed in (1, 2))
    differing = [{name: mean[name] + sign * apart[name] for name in names} for sign in (1, -1)]
    first, second = (
        effect(stepped(strategy, combined(strategy, updates, [1.0, 1.0]))) for updates in (differing, [mean, mean])
    )
    same = all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-4) for name in first)
    assert same == strategy.post_processes_sum


@not_summing
def test_what_is_no_sum_has_no_known_sensitivity(strategy: Strategy) -> None:
    assert strategy.sensitivity == "unbounded"
    assert not strategy.post_processes_sum


@pytest.mark.parametrize(
    ("wrapped", "sums"),
    [
        ("server_optimizer=fedadam", True),
        ("objective=fedprox", True),
        ("objective=fednova", False),
        ("objective=qfedavg", False),
        ("objective=scaffold", False),
        ("objective=feddyn", False),
        ("robust=median", False),
    ],
)
def test_a_wrapper_tells_whether_a_sum_is_left(wrapped: str, sums: bool) -> None:
    group, _, kind = wrapped.partition("=")
    config = TypeAdapter(schema.Strategy).validate_python({"kind": "fedit", group: {"kind": kind}})
    strategy = build_strategy(config)
    assert (strategy.is_linear, strategy.post_processes_sum) == (sums, sums)
    assert strategy.sensitivity == ("weighted_clip_norm" if sums else "unbounded")


@every_strategy
def test_the_order_of_arrival_does_not_show(strategy: Strategy) -> None:
    names = strategy.uploaded(names_of(strategy), 1)
    updates, weights = (
        [random_tensors(strategy, seed, names) for seed in range(7)],
        [1.0, 7.0, 1e-3, 500.0, 3.0, 2.0, 0.1],
    )
    forward, backward = (combined(strategy, updates[::way], weights[::way]) for way in (1, -1))
    assert_same_effect(stepped(strategy, forward), stepped(strategy, backward))


@every_strategy
@pytest.mark.parametrize("weight", [1e-9, 1.0, 12345.0])
def test_one_site_alone_gets_its_own_adapter_back(strategy: Strategy, weight: float) -> None:
    update = random_tensors(strategy, 3, strategy.uploaded(names_of(strategy), 1))
    result = combined(strategy, [update], [weight])
    assert all(tensor.dtype == torch.float32 for tensor in result.values())
    assert_same_effect(stepped(strategy, result), add(adapter_of(strategy), update))


@every_strategy
def test_equal_weights_of_any_size_are_the_same(strategy: Strategy) -> None:
    updates = [random_tensors(strategy, seed, strategy.uploaded(names_of(strategy), 1)) for seed in range(3)]
    ones, many = (combined(strategy, updates, [weight] * 3) for weight in (1.0, 250.0))
    assert_same_effect(stepped(strategy, ones), stepped(strategy, many))


@every_strategy
def test_a_weight_is_how_often_an_update_counts(strategy: Strategy) -> None:
    one, two = (random_tensors(strategy, seed, strategy.uploaded(names_of(strategy), 1)) for seed in (1, 2))
    weighted, repeated = combined(strategy, [one, two], [2.0, 1.0]), combined(strategy, [one, one, two], [1.0] * 3)
    assert_same_effect(stepped(strategy, weighted), stepped(strategy, repeated))


@every_strategy
def test_aggregators_share_nothing_and_keep_their_inputs(strategy: Strategy) -> None:
    update = random_tensors(strategy, 3, strategy.uploaded(names_of(strategy), 1))
    expected = combined(strategy, [update], [2.0])
    combined(strategy, [random_tensors(strategy, 9, strategy.uploaded(names_of(strategy), 1))], [50.0])
    given_to_it = {name: tensor.clone() for name, tensor in update.items()}
    aggregator = fresh(strategy)
    aggregator.accumulate(contribution(strategy, given_to_it, 2.0))
    for tensor in given_to_it.values():
        tensor.zero_()
    assert_near(aggregator.result(), expected)
    assert_near(aggregator.result(), expected)


@every_strategy
def test_a_step_keeps_what_it_was_given(strategy: Strategy) -> None:
    adapter = adapter_of(strategy)
    before = {name: tensor.clone() for name, tensor in adapter.items()}
    update = combined(strategy, [random_tensors(strategy, 2, strategy.uploaded(names_of(strategy), 1))], [1.0])
    after = strategy.server.step(adapter, update, strategy.server.init(adapter))[0]
    assert after.keys() >= names_of(strategy)
    assert_near(adapter, before)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


@every_strategy
def test_a_step_repeats_to_the_bit(strategy: Strategy) -> None:
    update = combined(strategy, [random_tensors(strategy, 2, strategy.uploaded(names_of(strategy), 1))], [1.0])
    first, second = stepped(strategy, update), stepped(strategy, update)
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_strategy
def test_a_zero_update_changes_nothing(strategy: Strategy) -> None:
    zero = zeros(strategy, strategy.uploaded(names_of(strategy), 1))
    assert_same_effect(stepped(strategy, combined(strategy, [zero, zero], [1.0, 2.0])), adapter_of(strategy))


@every_strategy
def test_metrics_are_finite_and_computed_from_updates_alone(strategy: Strategy) -> None:
    aggregator = fresh(strategy)
    assert dict(aggregator.metrics()) == {}
    for seed in range(3):
        aggregator.accumulate(
            contribution(strategy, random_tensors(strategy, seed, strategy.uploaded(names_of(strategy), 1)), 1.0)
        )
    assert all(math.isfinite(value) for value in aggregator.metrics().values())


@every_strategy
@pytest.mark.parametrize("number", [1, 2])
def test_a_site_that_trained_nothing_sends_zeros(strategy: Strategy, number: int) -> None:
    local = strategy.client.begin(local_start(strategy, adapter_of(strategy), number))
    outcome = local.finish(local.start)
    assert_near(outcome.update, zeros(strategy, strategy.uploaded(names_of(strategy), number)), tolerance=1e-5)
    assert bool(outcome.memory) == strategy.has_memory


@every_strategy
@pytest.mark.parametrize("number", [1, 2])
def test_what_a_site_sends_and_keeps_is_what_it_trained(strategy: Strategy, number: int) -> None:
    adapter = adapter_of(strategy)
    local = strategy.client.begin(local_start(strategy, adapter, number))
    trained = add(local.start, random_tensors(strategy, 5, strategy.trained(names_of(strategy), number)))
    outcome = local.finish(trained)
    assert outcome.update.keys() == strategy.uploaded(names_of(strategy), number)
    assert not outcome.update.keys() & outcome.memory.keys()
    assert_same_effect({**add(local.start, outcome.update), **outcome.memory}, trained)


@every_strategy
def test_a_site_that_kept_something_starts_from_it(strategy: Strategy) -> None:
    adapter, memory = adapter_of(strategy), {}
    local = strategy.client.begin(local_start(strategy, adapter, 1))
    trained = add(local.start, random_tensors(strategy, 5, strategy.trained(names_of(strategy), 1)))
    memory = local.finish(trained).memory
    again = strategy.client.begin(local_start(strategy, adapter, 2, memory))
    assert again.start.keys() == adapter.keys()
    assert all(torch.equal(again.start[name], memory.get(name, adapter[name])) for name in names_of(strategy))


@every_strategy
def test_there_is_no_result_of_nothing(strategy: Strategy) -> None:
    with pytest.raises(ValueError, match="there is no mean of no updates"):
        fresh(strategy).result()


@every_strategy
@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_is_positive_and_finite(strategy: Strategy, weight: float) -> None:
    aggregator = fresh(strategy)
    update = random_tensors(strategy, 0, strategy.uploaded(names_of(strategy), 1))
    with pytest.raises(ValueError, match=rf"weight={weight} must be positive and finite"):
        aggregator.accumulate(contribution(strategy, update, weight))


def local_start(
    strategy: Strategy, adapter: NamedTensors, number: int, memory: NamedTensors | None = None
) -> LocalStart:
    return LocalStart(
        adapter=adapter,
        extras={},
        memory=memory or {},
        trained=strategy.trained(names_of(strategy), number),
        uploaded=strategy.uploaded(names_of(strategy), number),
        local=LocalTraining(),
        learning_rate=1.0,
    )


@taking_ranks
@pytest.mark.parametrize("rank", [1, 2])
def test_a_site_of_lower_rank_gets_a_cut_and_its_update_counts(strategy: Strategy, rank: int) -> None:
    adapter, names = adapter_of(strategy), strategy.uploaded(names_of(strategy), 1)
    state = strategy.server.init(adapter)
    sent = strategy.server.download(adapter, state, strategy.downloaded(names_of(strategy), 1), rank)
    start = {**cut(adapter, rank), **sent}
    whole = shapes_of(strategy)
    assert all(
        sorted(start[name].shape) == sorted(rank if size == RANK else size for size in whole[name])
        for name in names_of(strategy)
        if any(part in name for part in ("lora_A", "lora_B", "lora_embedding"))
    )
    assert all(start[name].shape != whole[name] for name in CORE_NAMES & names)
    low = Contribution({name: torch.ones_like(start[name]) for name in names}, 1.0, sent)
    high = contribution(strategy, random_tensors(strategy, 3, names), 2.0)
    afters: list[NamedTensors] = []
    for order in ((low, high), (high, low)):
        aggregator = strategy.server.aggregator(adapter, state)
        for each in order:
            aggregator.accumulate(each)
        afters.append(strategy.server.step(adapter, aggregator.result(), state)[0])
    assert_same_effect(*afters)
    alone = stepped(strategy, combined(strategy, [random_tensors(strategy, 3, names)], [2.0]))
    moved, others = effect(afters[0]), effect(alone)
    assert all(not torch.allclose(moved[name], others[name], atol=1e-3) for name in moved)
