"""What the robust rules promise: breakdown points, geometry on the product, checks of their numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import robust as schema
from conf.schema.robust import replies_needed
from conf.schema.strategy import FedIT, FFALoRA
from protocol.errors import FederationError
from protocol.tensors import NamedTensors
from strategies.base import Contribution, ServerState
from strategies.build import build_strategy
from strategies.robust.geometry import gram
from strategies.robust.mixing import mixed
from strategies.robust.server import ROOT_PREFIX
from strategies.robust.updates import distances, stack

A, B, HEAD = "q.lora_A.weight", "q.lora_B.weight", "score.weight"
RANK, INNER, OUTER = 3, 11, 7


def adapter(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        A: torch.randn(RANK, INNER, generator=generator),
        B: torch.randn(OUTER, RANK, generator=generator),
        HEAD: torch.randn(2, 5, generator=generator),
    }


def flat(tensors: NamedTensors) -> np.ndarray:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double().numpy()


def vector(values: np.ndarray) -> dict[str, torch.Tensor]:
    return {HEAD: torch.from_numpy(values).float()}


def combine(
    config: schema.Robust, updates: list[NamedTensors], start: NamedTensors, state: ServerState | None = None
) -> NamedTensors:
    server = build_strategy(FedIT(robust=config)).server
    aggregator = server.aggregator(start, state or server.init(start))
    for update in updates:
        aggregator.accumulate(Contribution(update, 1.0))
    return aggregator.result()


def dense_change(update: NamedTensors, start: NamedTensors) -> torch.Tensor:
    before = start[B].double() @ start[A].double()
    left = start[B].double() + update.get(B, torch.zeros(OUTER, RANK)).double()
    right = start[A].double() + update.get(A, torch.zeros(RANK, INNER)).double()
    return left @ right - before


@pytest.mark.parametrize("names", [(A, B, HEAD), (B,), (A,), (B, HEAD)])
def test_inner_products_are_those_of_the_dense_products(names: tuple[str, ...]) -> None:
    start = adapter()
    updates = [{name: 0.1 * adapter(seed)[name] for name in names} for seed in range(1, 5)]
    dense = torch.stack([dense_change(update, start).flatten() for update in updates])
    if HEAD in names:
        dense = torch.cat([dense, torch.stack([update[HEAD].flatten() for update in updates]).double()], dim=1)
    flattened = torch.stack(
        [torch.from_numpy(flat({n: update[n] for n in (A, B) if n in names})) for update in updates]
    )
    dense = torch.cat([dense, flattened], dim=1)
    ours = gram(updates, [start] * 4, products=True)
    torch.testing.assert_close(ours, dense @ dense.T, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ours, gram(updates, [start] * 4, products=False), rtol=1e-2)


def test_distances_see_a_change_of_basis_that_leaves_the_product() -> None:
    """Two sites reach the same product by different factors: at one point as products, and their mean is elsewhere."""
    start = adapter()
    basis = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(9)).double()).Q
    moved = {A: start[A] + 0.3 * adapter(1)[A], B: start[B] + 0.3 * adapter(1)[B]}
    turned = {A: (basis.T @ moved[A].double()).float(), B: (moved[B].double() @ basis).float()}
    updates = [{name: end[name] - start[name] for name in (A, B)} for end in (moved, turned)]
    starts: list[NamedTensors] = [start, start]
    apart = distances(gram(updates, starts, products=False))[0, 1]
    assert apart > 1.0
    torch.testing.assert_close(distances(gram(updates, starts, products=True))[0, 1], apart, rtol=1e-6, atol=1e-6)


def test_embeddings_pair_the_other_way_round() -> None:
    start = {"e.lora_embedding_A": torch.randn(2, 9), "e.lora_embedding_B": torch.randn(4, 2)}
    update = {name: torch.randn_like(tensor) for name, tensor in start.items()}
    left, right = start["e.lora_embedding_B"].double(), start["e.lora_embedding_A"].double()
    dense = (left + update["e.lora_embedding_B"]) @ (right + update["e.lora_embedding_A"]) - left @ right
    own = torch.stack([tensor.double().square().sum() for tensor in update.values()]).sum()
    torch.testing.assert_close(gram([update], [start], products=True)[0, 0], dense.square().sum() + own)


HONEST_RADIUS = 1.0


@st.composite
def attacked(draw: st.DrawFn, more: int) -> tuple[int, list[np.ndarray], list[np.ndarray]]:
    """f attackers that send anything, and honest updates within a ball, in the order in which they are sent."""
    f = draw(st.integers(1, 3))
    count = more * f + draw(st.integers(3, 5))
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    center = generator.normal(size=10) * draw(st.sampled_from([0.0, 1.0, 30.0]))
    honest: list[np.ndarray] = []
    for _ in range(count - f):
        direction = generator.normal(size=10)
        honest.append(center + direction / np.linalg.norm(direction) * HONEST_RADIUS * generator.uniform())
    size = draw(st.sampled_from([0.5, 3.0, 100.0, 1e6]))
    together = draw(st.booleans())
    shared = generator.normal(size=10)
    attackers = [size * (shared if together else generator.normal(size=10)) for _ in range(f)]
    return f, honest, attackers


def updates_of(vectors: list[np.ndarray]) -> list[NamedTensors]:
    return [vector(each.reshape(2, 5)) for each in vectors]


@settings(deadline=None, max_examples=40)
@given(attacked(2), st.sampled_from([schema.CoordinateMedian, schema.TrimmedMean]))
def test_coordinates_stay_between_honest_ones(
    drawn: tuple[int, list[np.ndarray], list[np.ndarray]],
    rule: type[schema.CoordinateMedian] | type[schema.TrimmedMean],
) -> None:
    f, honest, attackers = drawn
    result = flat(combine(rule(attackers=f), updates_of(attackers + honest), adapter()))
    low, high = np.min(honest, axis=0), np.max(honest, axis=0)
    slack = 1e-5 * (1 + np.abs(honest).max())
    assert np.all(result >= low - slack)
    assert np.all(result <= high + slack)


@settings(deadline=None, max_examples=40)
@given(attacked(2))
def test_what_krum_selects_is_near_honest_updates(drawn: tuple[int, list[np.ndarray], list[np.ndarray]]) -> None:
    """The best honest score is at most (K-f-2)(2R)², and what is selected has an honest neighbor within that."""
    f, honest, attackers = drawn
    count = len(honest) + f
    bound = 2 * HONEST_RADIUS * math.sqrt(count - f - 2) * 1.001 + 1e-2
    chosen = flat(combine(schema.Krum(attackers=f), updates_of(attackers + honest), adapter()))
    assert min(np.linalg.norm(chosen - each) for each in honest) <= bound
    mean = flat(combine(schema.MultiKrum(attackers=f), updates_of(attackers + honest), adapter()))
    assert min(np.linalg.norm(mean - each) for each in honest) <= bound + 2 * HONEST_RADIUS


@settings(deadline=None, max_examples=40)
@given(attacked(4))
def test_bulyan_stays_between_honest_coordinates(drawn: tuple[int, list[np.ndarray], list[np.ndarray]]) -> None:
    """Of θ - 2f values nearest to the median, none lies further from it than an honest one does."""
    f, honest, attackers = drawn
    result = flat(combine(schema.Bulyan(attackers=f), updates_of(attackers + honest), adapter()))
    spread = np.max(honest, axis=0) - np.min(honest, axis=0)
    slack = 1e-5 * (1 + np.abs(honest).max())
    assert np.all(result >= np.min(honest, axis=0) - spread - slack)
    assert np.all(result <= np.max(honest, axis=0) + spread + slack)


@settings(deadline=None, max_examples=40)
@given(attacked(2))
def test_the_geometric_median_breaks_down_at_one_half(drawn: tuple[int, list[np.ndarray], list[np.ndarray]]) -> None:
    """‖median - center‖ ≤ 2 (1-α) / (1-2α) R for a share α of attackers (Minsker 2015, lemma 2.1)."""
    f, honest, attackers = drawn
    share = f / (len(honest) + f)
    config = schema.GeometricMedian(attackers=f, iterations=300)
    result = flat(combine(config, updates_of(attackers + honest), adapter()))
    center = np.mean(honest, axis=0)
    radius = max(np.linalg.norm(each - center) for each in honest)
    assert np.linalg.norm(result - center) <= 2 * (1 - share) / (1 - 2 * share) * radius * 1.05 + 1e-2


@pytest.mark.parametrize(("count", "attackers"), [(7, 3), (11, 5), (21, 10), (7, 1)])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e9])
def test_no_attack_outlasts_the_iterations_that_are_set(count: int, attackers: int, size: float) -> None:
    """As it is set, and however far away they are: a large enough update must not pull for 32 iterations."""
    generator = np.random.default_rng(count)
    honest = [generator.normal(size=10) for _ in range(count - attackers)]
    found = flat(combine(schema.GeometricMedian(), updates_of([*honest, *[np.full(10, size)] * attackers]), adapter()))
    spread = max(float(np.linalg.norm(each - np.mean(honest, axis=0))) for each in honest)
    assert float(np.linalg.norm(found - np.mean(honest, axis=0))) <= 3 * spread


def test_the_geometric_median_minimizes_the_sum_of_distances() -> None:
    generator = np.random.default_rng(3)
    points = [generator.normal(size=10) for _ in range(9)]
    config = schema.GeometricMedian(iterations=500, distance="factors")
    result = flat(combine(config, updates_of(points), adapter()))

    def cost(at: np.ndarray) -> float:
        return sum(float(np.linalg.norm(at - each)) for each in points)

    for _ in range(50):
        assert cost(result) <= cost(result + 1e-2 * generator.normal(size=10)) + 1e-9


def test_centered_clipping_is_the_papers_iteration_from_the_last_rounds_result() -> None:
    config = schema.CenteredClipping(attackers=1, radius=0.7, iterations=3)
    server = build_strategy(FedIT(robust=config)).server
    start: NamedTensors = {HEAD: torch.zeros(2, 5)}
    state, wanted, generator = server.init(start), np.zeros(10), np.random.default_rng(5)
    for _ in range(3):
        points = [generator.normal(size=10) for _ in range(5)]
        for _ in range(3):
            steps = [(x - wanted) * min(1.0, 0.7 / float(np.linalg.norm(x - wanted))) for x in points]
            wanted = wanted + np.mean(steps, axis=0)
        aggregator = server.aggregator(start, state)
        for update in updates_of(points):
            aggregator.accumulate(Contribution(update, 1.0))
        combined = aggregator.result()
        np.testing.assert_allclose(flat(combined), wanted, rtol=1e-5, atol=1e-6)
        _, state = server.step(start, combined, state)


def test_one_update_moves_centered_clipping_by_its_radius_at_most() -> None:
    honest = [np.zeros(10)] * 4
    config = schema.CenteredClipping(attackers=1, radius=0.5, iterations=1)
    result = flat(combine(config, updates_of([*honest, 1e9 * np.ones(10)]), adapter()))
    assert np.linalg.norm(result) == pytest.approx(0.5 / 5, rel=1e-5)


def test_fltrust_is_the_papers_weighted_sum() -> None:
    generator = np.random.default_rng(8)
    root, points = generator.normal(size=10), [generator.normal(size=10) for _ in range(5)]
    points[0] = -root
    state = ServerState({ROOT_PREFIX + HEAD: vector(root.reshape(2, 5))[HEAD]})
    scores = [max(float(x @ root / np.linalg.norm(x) / np.linalg.norm(root)), 0.0) for x in points]
    assert scores[0] == 0
    total = [score * np.linalg.norm(root) / np.linalg.norm(x) * x for score, x in zip(scores, points, strict=True)]
    result = flat(combine(schema.FLTrust(), updates_of(points), {HEAD: torch.zeros(2, 5)}, state))
    np.testing.assert_allclose(result, np.sum(total, axis=0) / np.sum(scores), rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(result) <= np.linalg.norm(root) * (1 + 1e-6)
    opposed = flat(combine(schema.FLTrust(), updates_of([-root, -2 * root]), {HEAD: torch.zeros(2, 5)}, state))
    assert np.all(opposed == 0)


def test_fltrust_without_a_root_update_is_refused() -> None:
    with pytest.raises(ValueError, match="FLTrust needs the server's own update, trained on root records"):
        combine(schema.FLTrust(), updates_of([np.ones(10)]), adapter())


@pytest.mark.parametrize("distance", ["product", "factors"])
def test_the_norm_bound_shortens_what_is_long_and_nothing_else(distance: schema.Distance) -> None:
    config = schema.NormBound(max_norm=2.0, distance=distance)
    short, long = np.full(10, 0.1), np.full(10, 50.0)
    result = flat(combine(config, updates_of([short, long]), adapter()))
    np.testing.assert_allclose(result, (short + long * 2.0 / np.linalg.norm(long)) / 2, rtol=1e-5)


def test_the_norm_bound_measures_factor_and_product_where_b_alone_moves() -> None:
    start = adapter()
    update = {B: 5.0 * adapter(3)[B]}
    strategy = build_strategy(FFALoRA(robust=schema.NormBound(max_norm=1.5)))
    aggregator = strategy.server.aggregator(start, ServerState())
    aggregator.accumulate(Contribution(update, 1.0))
    bounded = aggregator.result()
    length = math.hypot(float(dense_change(bounded, start).norm()), float(bounded[B].norm()))
    assert length == pytest.approx(1.5, rel=1e-5)
    assert aggregator.metrics() == {"shortened_share": 1.0}


GAUGED: list[schema.Robust] = [
    schema.CoordinateMedian(),
    schema.TrimmedMean(),
    schema.TrimmedMean(mixing=schema.NearestNeighbors()),
    schema.Krum(),
    schema.MultiKrum(),
    schema.Bulyan(),
    schema.GeometricMedian(),
    schema.CenteredClipping(radius=0.5),
    schema.NormBound(max_norm=1.0),
    schema.FLTrust(),
]


@pytest.mark.parametrize("size", [1.5, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("config", GAUGED, ids=lambda config: f"{config.kind}")
def test_an_honest_product_in_factors_of_another_size_moves_no_rule(config: schema.Robust, size: float) -> None:
    """B' = G B, A' = A / G: seen as products the attacker is the most honest of all; the mean of factors is ruined."""
    start, generator = {name: adapter()[name] for name in (A, B)}, torch.Generator().manual_seed(4)
    common = {B: 0.05 * torch.randn(OUTER, RANK, generator=generator), A: torch.zeros(RANK, INNER)}
    honest: list[NamedTensors] = [
        {name: common[name] + 0.01 * torch.randn(common[name].shape, generator=generator) for name in (A, B)}
        for _ in range(7)
    ]
    center = {name: torch.stack([each[name] for each in honest]).mean(0) for name in (A, B)}
    attack = {
        B: size * (start[B] + center[B]) - start[B],
        A: (start[A] + center[A]) / size - start[A],
    }
    state = ServerState({ROOT_PREFIX + name: tensor for name, tensor in center.items()})
    result = combine(config, [*honest, attack], start, state)
    wanted = float(dense_change(center, start).norm())
    error = float((dense_change(result, start) - dense_change(center, start)).norm()) / wanted
    assert error < 1.0, "the attack costs less than the whole update"


HOLDING: list[schema.Robust] = [
    schema.CoordinateMedian(),
    schema.TrimmedMean(),
    schema.Krum(),
    schema.MultiKrum(selected=3),
    schema.Bulyan(),
    schema.GeometricMedian(),
    schema.CenteredClipping(),
]
MIXINGS: list[schema.Mixing] = [schema.NoMixing(), schema.Bucketing(size=2), schema.NearestNeighbors()]


@pytest.mark.parametrize("mixing", MIXINGS, ids=lambda mixing: mixing.kind)
@pytest.mark.parametrize("config", HOLDING, ids=lambda config: config.kind)
def test_too_few_replies_stop_the_round_and_enough_do_not(config: schema.Robust, mixing: schema.Mixing) -> None:
    config = config.model_copy(update={"mixing": mixing})
    needed, start = replies_needed(config), adapter()
    updates = [adapter(seed) for seed in range(1, needed + 1)]
    result = combine(config, updates, start)
    assert {name: tensor.shape for name, tensor in result.items()} == {name: each.shape for name, each in start.items()}
    if needed > 1:
        with pytest.raises(FederationError, match=rf"withstands 1 attackers among {needed} valid replies or more"):
            combine(config, updates[:-1], start)
    backward = combine(config, updates[::-1], start)
    for name in start:
        torch.testing.assert_close(result[name], backward[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (schema.NoRobustness(), 1),
        (schema.NormBound(), 1),
        (schema.CoordinateMedian(attackers=2), 5),
        (schema.Krum(attackers=2), 7),
        (schema.MultiKrum(attackers=2, selected=6), 8),
        (schema.Bulyan(attackers=2), 11),
        (schema.CoordinateMedian(attackers=2, mixing=schema.Bucketing(size=3)), 13),
        (schema.FLTrust(), 1),
    ],
)
def test_how_many_replies_are_needed(config: schema.Robust, needed: int) -> None:
    assert replies_needed(config) == needed


def test_updates_of_several_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="need updates of one layout"):
        combine(schema.CoordinateMedian(attackers=0), [{HEAD: torch.ones(2, 5)}, {HEAD: torch.ones(2, 4)}], adapter())
    with pytest.raises(ValueError, match="there is no mean of no updates"):
        combine(schema.CoordinateMedian(), [], adapter())
    aggregator = build_strategy(FedIT(robust=schema.Krum())).server.aggregator(adapter(), ServerState())
    with pytest.raises(ValueError, match=r"weight=0.0 must be positive and finite"):
        aggregator.accumulate(Contribution(adapter(), 0.0))


def test_mixing_keeps_the_mean_and_lowers_the_spread() -> None:
    updates = [adapter(seed) for seed in range(1, 9)]
    raw = stack(updates, [adapter()] * 8, products=False)

    def spread(values: torch.Tensor) -> float:
        return float(values.flatten(1).var(dim=0).sum())

    buckets = mixed(raw, schema.Bucketing(size=2), 1)
    assert len(buckets) == 4
    torch.testing.assert_close(buckets.stacked(A).mean(0), raw.stacked(A).mean(0))
    assert spread(buckets.stacked(A)) < 0.8 * spread(raw.stacked(A))
    neighbors = mixed(raw, schema.NearestNeighbors(), 2)
    assert len(neighbors) == 8
    assert spread(neighbors.stacked(A)) < 0.5 * spread(raw.stacked(A))
    torch.testing.assert_close(neighbors.mixing.sum(1), torch.ones(8, dtype=torch.float64))


def test_neighbors_of_honest_updates_leave_out_the_far_attacker() -> None:
    updates = [
        *(vector(0.01 * np.random.default_rng(n).normal(size=(2, 5))) for n in range(5)),
        vector(np.ones((2, 5))),
    ]
    raw = stack(updates, [adapter()] * 6, products=False)
    near = mixed(raw, schema.NearestNeighbors(), 1)
    attacker = next(row for row, update in enumerate(raw.given) if float(update[HEAD].sum()) > 5)
    honest = [row for row in range(6) if row != attacker]
    assert torch.all(near.mixing[honest][:, attacker] == 0)


@pytest.mark.parametrize("config", HOLDING, ids=lambda config: config.kind)
def test_what_a_rule_kept_is_not_what_the_caller_changes(config: schema.Robust) -> None:
    """An aggregator holds copies: what a site's buffer is used for next does not reach into a round."""
    server = build_strategy(FedIT(robust=config)).server
    updates = [adapter(seed) for seed in range(1, 8)]
    wanted = combine(config, updates, adapter())
    aggregator = server.aggregator(adapter(), ServerState())
    for update in updates:
        given_to_it = {name: tensor.clone() for name, tensor in update.items()}
        aggregator.accumulate(Contribution(given_to_it, 1.0))
        for tensor in given_to_it.values():
            tensor.zero_()
    for name, tensor in aggregator.result().items():
        torch.testing.assert_close(tensor, wanted[name])
