"""What every strategy promises, asked of every strategy that can be configured.

Factors may be turned, stacked or folded; what an adapter *does* is the product of its factors. So adapters are compared
by their effect: the dense ΔW of each layer, and every other tensor as it is.
"""

import math
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from conf.schema import strategy as schema
from conf.schema.federation import LocalTraining
from protocol.tensors import NamedTensors, add
from strategies.base import Aggregator, Contribution, LocalStart, Strategy
from strategies.build import STRATEGIES, build_strategy
from strategies.lora.factors import cut

VARIANTS: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(schema.Strategy)[0])
STRATEGIES_BUILT = [build_strategy(variant()) for variant in VARIANTS]  # type: ignore[call-arg, arg-type]
NAMED = [pytest.param(each, id=variant.__name__) for each, variant in zip(STRATEGIES_BUILT, VARIANTS, strict=True)]
every_strategy = pytest.mark.parametrize("strategy", NAMED)
summing = pytest.mark.parametrize("strategy", [each for each in NAMED if each.values[0].is_linear])  # type: ignore[union-attr]
not_summing = pytest.mark.parametrize("strategy", [each for each in NAMED if not each.values[0].is_linear])  # type: ignore[union-attr]
RANK = 4
SHAPES = {
    f"base_model.model.{name}": shape
    for name, shape in {
        "layers.0.q_proj.lora_A.weight": (RANK, 6),
        "layers.0.q_proj.lora_B.weight": (7, RANK),
        "layers.1.down_proj.lora_A.weight": (RANK, 5),
        "layers.1.down_proj.lora_B.weight": (8, RANK),
        "layers.1.down_proj.lora_magnitude_vector": (8,),
        "embed_tokens.lora_embedding_A": (RANK, 9),
        "embed_tokens.lora_embedding_B": (5, RANK),
        "score.weight": (2, 5),
    }.items()
}
ZERO_NAMES = {name for name in SHAPES if ".lora_B." in name or "lora_embedding_A" in name}
CORE_NAMES = {f"base_model.model.layers.{module}.lora_core" for module in ("0.q_proj", "1.down_proj")}
CORES = {id(strategy): variant().cores for strategy, variant in zip(STRATEGIES_BUILT, VARIANTS, strict=True)}  # type: ignore[attr-defined]


def shapes_of(strategy: Strategy) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter: with square cores where the strategy trains them, and then without embeddings."""
    heads = CORES[id(strategy)]
    if heads == 0:
        return SHAPES
    found = {name: shape for name, shape in SHAPES.items() if "embedding" not in name}
    for module in ("base_model.model.layers.0.q_proj", "base_model.model.layers.1.down_proj"):
        found[f"{module}.lora_core"] = (heads, RANK // heads, RANK // heads)
        found[f"{module}.lora_core_scale"] = (heads,)
    return found


def names_of(strategy: Strategy) -> frozenset[str]:
    return frozenset(shapes_of(strategy))


def random_tensors(strategy: Strategy, seed: int, names: frozenset[str] | None = None) -> dict[str, torch.Tensor]:
    generator, shapes = torch.Generator().manual_seed(seed), shapes_of(strategy)
    wanted = shapes.keys() if names is None else names
    return {name: torch.randn(shapes[name], generator=generator) for name in sorted(shapes) if name in wanted}


def zeros(strategy: Strategy, names: frozenset[str]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shapes_of(strategy)[name]) for name in names}


def adapter_of(strategy: Strategy) -> NamedTensors:
    """An adapter as it may be in the middle of a run."""
    drawn = random_tensors(strategy, 1)
    ones = {name: torch.ones_like(tensor) for name, tensor in drawn.items() if name.endswith("lora_core_scale")}
    return strategy.initial({**drawn, **ones})


def effect(adapter: NamedTensors) -> dict[str, torch.Tensor]:
    """The dense ΔW of every layer in float64, with what was folded into it, and every tensor that is no factor."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in adapter.items():
        if ".lora_B." in name:
            core = core_of(adapter, name.partition(".lora_B")[0])
            found[name] = tensor.double() @ core @ adapter[name.replace("lora_B", "lora_A")].double()
            found[name] += offset(adapter, name.partition(".lora_B")[0], found[name])
        elif name.endswith("lora_embedding_B"):
            found[name] = tensor.double() @ adapter[name.replace("embedding_B", "embedding_A")].double()
            found[name] += offset(adapter, name.partition(".lora_embedding_B")[0], found[name].T).T
        elif not any(part in name for part in ("lora_A", "lora_offset", "lora_core")) and not name.endswith(
            "lora_embedding_A"
        ):
            found[name] = tensor.double()
    return found


def core_of(adapter: NamedTensors, module: str) -> torch.Tensor:
    core = adapter.get(f"{module}.lora_core")
    if core is None:
        return torch.eye(adapter[f"{module}.lora_A.weight"].shape[0], dtype=torch.float64)
    return torch.block_diag(*(core * adapter[f"{module}.lora_core_scale"][:, None, None]).double())


def offset(adapter: NamedTensors, module: str, like: torch.Tensor) -> torch.Tensor:
    left, right = (adapter.get(f"{module}.lora_offset_{side}") for side in ("left", "right"))
    return torch.zeros_like(like) if left is None or right is None else left.double() @ right.double()


def fresh(strategy: Strategy) -> Aggregator:
    adapter = adapter_of(strategy)
    return strategy.server.aggregator(adapter, strategy.server.init(adapter))


def contribution(strategy: Strategy, update: NamedTensors, weight: float) -> Contribution:
    adapter = adapter_of(strategy)
    names = strategy.downloaded(names_of(strategy), 1)
    start = strategy.server.download(adapter, strategy.server.init(adapter), names, None)
    return Contribution(update, weight, start)


def combined(strategy: Strategy, updates: list[NamedTensors], weights: list[float]) -> NamedTensors:
    aggregator = fresh(strategy)
    for update, weight in zip(updates, weights, strict=True):
        aggregator.accumulate(contribution(strategy, update, weight))
    return aggregator.result()


def length(tensors: NamedTensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def clipped(update: NamedTensors, clip_norm: float) -> NamedTensors:
    factor = min(1.0, clip_norm / length(update))
    return {name: tensor * factor for name, tensor in update.items()}


def stepped(strategy: Strategy, update: NamedTensors) -> NamedTensors:
    adapter = adapter_of(strategy)
    return strategy.server.step(adapter, update, strategy.server.init(adapter))[0]


def assert_near(left: NamedTensors, right: NamedTensors, tolerance: float = 1e-6) -> None:
    assert left.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


def assert_same_effect(left: NamedTensors, right: NamedTensors) -> None:
    assert_near(effect(left), effect(right), tolerance=1e-5)


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


@every_strategy
@pytest.mark.parametrize("rank", [1, 2])
def test_a_site_of_lower_rank_gets_a_cut_and_its_update_counts(strategy: Strategy, rank: int) -> None:
    if not strategy.takes_ranks:
        pytest.skip("makes no such promise")
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
