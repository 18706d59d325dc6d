"""Each rule against the dense truth Σ pₖ BₖAₖ, in double precision, on random factors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from conf.schema.federation import LocalTraining
from protocol.errors import ReplyRejected
from strategies.base import Contribution, LocalStart
from strategies.lora.drift import DRIFT, Drift, MeasuredMean
from strategies.lora.factors import cut
from strategies.lora.fedex import fedex
from strategies.lora.fedit import fedit
from strategies.lora.fedrot import aligned, fedrot
from strategies.lora.fedsa import fedsa
from strategies.lora.fedsvd import fedsvd
from strategies.lora.ffa_lora import ffa_lora
from strategies.lora.flexlora import flexlora
from strategies.lora.flora import flora
from strategies.lora.hetlora import hetlora
from strategies.lora.rolora import rolora
from strategies.lora.spectral import truncated
from strategies.objectives.fednova import NormalizedServer

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
OFFSET, RIGHT = "layer.lora_offset_left", "layer.lora_offset_right"


@pytest.mark.parametrize("strategy", [fedsvd(), ffa_lora(), rolora()], ids=["fedsvd", "ffa_lora", "rolora"])
def test_with_one_common_factor_the_mean_is_exact(strategy: Any, federation: Any, error: Any) -> None:
    case = federation(common_a=True)
    replies = [Contribution({B: each.update[B]}, each.weight, each.start) for each in case.contributions()]
    state = strategy.server.init(case.adapter)
    aggregator = strategy.server.aggregator(case.adapter, state)
    for reply in replies:
        aggregator.accumulate(reply)
    after = strategy.server.step(case.adapter, aggregator.result(), state)[0]
    assert error(after, case.truth) < 1e-6
    assert DRIFT not in aggregator.metrics()


def test_fedsvd_keeps_its_basis_orthonormal_and_sorted(federation: Any) -> None:
    after = federation(common_a=True).aggregated(fedsvd())
    torch.testing.assert_close(after[A] @ after[A].T, torch.eye(8), rtol=1e-5, atol=1e-6)
    sizes = after[B].norm(dim=0)
    assert bool((sizes[:-1] >= sizes[1:]).all())
    overlaps = after[B].double().T @ after[B].double()
    assert float((overlaps - overlaps.diagonal().diag()).abs().max()) < 1e-4 * float(overlaps.max())


def test_fedsvd_starts_from_an_orthonormal_basis_of_the_drawn_space() -> None:
    drawn = {A: torch.randn(4, 30, generator=torch.Generator().manual_seed(0)), B: torch.zeros(20, 4)}
    start = fedsvd().initial(drawn)
    torch.testing.assert_close(start[A] @ start[A].T, torch.eye(4), rtol=1e-6, atol=1e-6)
    assert not start[B].any()
    projected = drawn[A] @ start[A].T @ start[A]
    torch.testing.assert_close(projected, drawn[A], rtol=1e-5, atol=1e-5)


def test_rotational_drift_ruins_fedit_and_not_fedrot(federation: Any, error: Any) -> None:
    """Mild differences, strong rotations: FedIT is off by a third, FedRot by what any rank-r adapter must be."""
    case = federation(m=768, n=768, spread=0.24, angle=0.315)
    left = torch.cat([w / sum(case.weights) * b for w, (b, _) in zip(case.weights, case.pairs, strict=True)], dim=1)
    right = torch.cat([a for _, a in case.pairs])
    best_b, best_a = truncated(left, right, 8)
    best = error({A: best_a, B: best_b}, case.truth)
    assert best == pytest.approx(0.019, abs=0.002)
    assert error(case.aggregated(fedit()), case.truth) == pytest.approx(0.32, abs=0.02)

    reference = (case.adapter[B], case.adapter[A])
    turned = type(case)(case.adapter, [aligned(pair, reference) for pair in case.pairs], case.weights)
    assert float((turned.truth - case.truth).norm() / case.truth.norm()) < 1e-12, "a rotation changes no product"
    assert error(turned.aggregated(fedrot()), case.truth) < 1.02 * best


def test_alignment_undoes_a_rotation_whatever_the_factors_scales(federation: Any) -> None:
    case = federation(spread=0.0, angle=1.0)
    for scale in (1e-3, 1.0, 1e3):
        b0, a0 = case.adapter[B] * scale, case.adapter[A] / scale
        for b, a in case.pairs:
            back = aligned((b * scale, a / scale), (b0, a0))
            torch.testing.assert_close(back[0], b0, rtol=1e-9, atol=1e-9 * scale)
            torch.testing.assert_close(back[1], a0, rtol=1e-9, atol=1e-9 / scale)


def test_a_zero_reference_has_no_say_in_the_alignment(federation: Any) -> None:
    case = federation(spread=0.0, angle=1.0)
    b, a = case.pairs[0]
    back = aligned((b, a), (torch.zeros_like(b), case.adapter[A]))
    torch.testing.assert_close(back[1], case.adapter[A])


@pytest.mark.parametrize(("spread", "angle"), [(0.05, 0.0), (0.05, 0.36), (0.6, 0.2), (0.0, 0.0)])
def test_the_logged_drift_is_fedits_relative_error(
    spread: float, angle: float, federation: Any, error: Callable[..., float]
) -> None:
    """Estimated from four directions a layer; over many layers the estimate is as good as the number."""
    cases = [federation(spread=spread, angle=angle, seed=seed) for seed in range(16)]
    adapter = {f"{i}.{name}": case.adapter[name] for i, case in enumerate(cases) for name in (A, B)}
    aggregator = MeasuredMean({name: tensor.float() for name, tensor in adapter.items()})
    for site in range(10):
        parts = [case.contributions()[site] for case in cases]
        update = {f"{i}.{name}": part.update[name].float() for i, part in enumerate(parts) for name in (A, B)}
        aggregator.accumulate(Contribution(update, parts[0].weight))
    gaps = [error(case.aggregated(fedit()), case.truth) * float(case.truth.norm()) for case in cases]
    exact = (sum(gap**2 for gap in gaps) / sum(float(case.truth.norm()) ** 2 for case in cases)) ** 0.5
    assert aggregator.metrics()[DRIFT] == pytest.approx(exact, rel=0.1, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.5], ids=["as sent", "stale, halved"])
def test_the_drift_is_about_the_adapters_that_are_averaged(scale: float, federation: Any) -> None:
    """A buffered reply started from an older adapter and is scaled; it counts as a move from the server's own."""
    adapter, cases = _many_layers(federation)
    plain, late = MeasuredMean(adapter), MeasuredMean(adapter)
    products = {name: torch.zeros(96, 80, dtype=torch.float64) for name in cases}
    means = {name: torch.zeros_like(tensor) for name, tensor in adapter.items()}
    for site in range(10):
        update = {
            f"{layer}.{name}": (scale if site % 2 else 1.0) * case.contributions()[site].update[name].float()
            for layer, case in cases.items()
            for name in (A, B)
        }
        plain.accumulate(Contribution(update, 1.0, adapter))
        older = {name: tensor - 3 for name, tensor in adapter.items()}
        late.accumulate(Contribution(update, 1.0, older))
        after = {name: adapter[name] + update[name] for name in adapter}
        for layer in cases:
            products[layer] += after[f"{layer}.{B}"].double() @ after[f"{layer}.{A}"].double() / 10
        means = {name: means[name] + after[name] / 10 for name in adapter}
    gap = sum(float((products[n] - (means[f"{n}.{B}"] @ means[f"{n}.{A}"]).double()).square().sum()) for n in cases)
    exact = (gap / sum(float(each.square().sum()) for each in products.values())) ** 0.5
    assert late.metrics() == plain.metrics()
    assert late.metrics()[DRIFT] == pytest.approx(exact, rel=0.1)


def _many_layers(federation: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    cases = {str(seed): federation(spread=0.3, angle=0.2, seed=seed) for seed in range(16)}
    return {f"{layer}.{name}": case.adapter[name].float() for layer, case in cases.items() for name in (A, B)}, cases


def test_fednova_logs_no_drift() -> None:
    """It averages updates per step, which no adapter is made of."""
    adapter = {A: torch.randn(8, 20), B: torch.randn(30, 8)}
    for wrapped, logged in ((NormalizedServer(fedit().server), {}), (fedit().server, {DRIFT: 0.0})):
        aggregator = wrapped.aggregator(adapter, wrapped.init(adapter))
        aggregator.accumulate(Contribution({name: torch.ones_like(adapter[name]) for name in adapter}, 1.0, adapter))
        assert aggregator.metrics() == pytest.approx(logged, abs=1e-6)


def test_fedsa_shares_a_and_remembers_b() -> None:
    adapter = {A: torch.ones(2, 3), B: torch.zeros(4, 2), "score.weight": torch.ones(2, 2)}
    names, strategy = frozenset(adapter), fedsa()
    uploaded = strategy.uploaded(names, 1)
    assert uploaded == {A, "score.weight"}

    def start(number: int, memory: dict[str, torch.Tensor]) -> LocalStart:
        return LocalStart(adapter, {}, memory, strategy.trained(names, number), uploaded, LocalTraining(), 1.0)

    first = strategy.client.begin(start(1, {})).finish({name: tensor + 2 for name, tensor in adapter.items()})
    assert first.update.keys() == uploaded
    assert torch.equal(first.memory[B], torch.full((4, 2), 2.0))
    assert first.memory.keys() == {B}
    again = strategy.client.begin(start(2, dict(first.memory)))
    assert torch.equal(again.start[B], torch.full((4, 2), 2.0))
    assert torch.equal(again.start[A], adapter[A])


def test_rolora_takes_turns() -> None:
    names, strategy = frozenset({A, B, "score.weight"}), rolora()
    assert [strategy.trained(names, number) for number in (1, 2, 3)] == [
        {B, "score.weight"},
        {A, "score.weight"},
        {B, "score.weight"},
    ]


@pytest.mark.parametrize("strategy", [flora(), fedex()], ids=["flora", "fedex"])
@pytest.mark.parametrize(("m", "n", "sites"), [(96, 80, 10), (20, 96, 10), (96, 80, 1), (30, 30, 2)])
def test_folding_rules_are_exact(strategy: Any, m: int, n: int, sites: int, federation: Any, error: Any) -> None:
    case = federation(sites=sites, m=m, n=n)
    case = type(case)(strategy.initial(case.adapter), case.pairs, case.weights)
    assert error(case.aggregated(strategy), case.truth) < 1e-6


def test_flora_is_exact_at_mixed_ranks(federation: Any, error: Any) -> None:
    case = federation(ranks=(8, 2, 5, 8, 1))
    case = type(case)(flora().initial(case.adapter), case.pairs, case.weights)
    after = case.aggregated(flora())
    assert error(after, case.truth) < 1e-6
    assert after[OFFSET].shape == (96, 24)
    assert torch.equal(after[A], case.adapter[A])
    assert not after[B].any()


def test_what_was_folded_adds_up_over_rounds_and_stays_below_full_rank(federation: Any, effect: Any) -> None:
    case = federation(sites=6, rank=8, m=96, n=80)
    adapter, truth = flora().initial(case.adapter), torch.zeros(96, 80, dtype=torch.float64)
    sizes: list[int] = []
    for _ in range(3):
        adapter = type(case)(adapter, case.pairs, case.weights).aggregated(flora())
        truth = truth + case.truth
        sizes.append(adapter[OFFSET].shape[1])
        assert float((effect(adapter) - truth).norm() / truth.norm()) < 1e-6
    assert sizes == [48, 80, 80]


def test_fedexs_residual_has_the_rank_of_a_covariance(federation: Any, error: Any) -> None:
    """K sites of rank r: (K-1) r, not K r, because centered factors add up to zero."""
    case = federation(sites=4, rank=8, m=96, n=80)
    after = case.aggregated(fedex())
    assert after[OFFSET].shape == (96, 24)
    means = {A: after[A], B: after[B]}
    assert error(means, case.truth) == pytest.approx(error(case.aggregated(fedit()), case.truth), rel=1e-9)


@pytest.mark.parametrize("ranks", [(8,) * 10, (8, 2, 5, 8, 1)])
def test_flexlora_is_eckart_and_youngs_optimum(ranks: tuple[int, ...], federation: Any, effect: Any) -> None:
    case = federation(ranks=ranks)
    u, values, vt = np.linalg.svd(case.truth.numpy())
    optimum = (u[:, :8] * values[:8]) @ vt[:8]
    np.testing.assert_allclose(effect(case.aggregated(flexlora())).numpy(), optimum, atol=1e-5 * values[0])


def test_a_cut_of_flexloras_adapter_is_the_optimum_of_the_lower_rank(federation: Any, effect: Any) -> None:
    case = federation()
    after = case.aggregated(flexlora())
    u, values, vt = np.linalg.svd(case.truth.numpy())
    optimum = (u[:, :3] * values[:3]) @ vt[:3]
    np.testing.assert_allclose(effect(cut(after, 3)).numpy(), optimum, atol=1e-5 * values[0])


def test_flexlora_keeps_factors_that_can_be_trained(federation: Any) -> None:
    """All sites of rank 2: the other six components keep a right factor, or no gradient would ever reach them."""
    after = federation(ranks=(2, 2)).aggregated(flexlora())
    assert after[B].shape == (96, 8)
    assert bool((after[A].norm(dim=1) > 0.1).all())


def test_hetlora_is_its_definition(federation: Any) -> None:
    case = federation(ranks=(8, 2, 5))
    after = case.aggregated(hetlora())
    sizes = [w * float((b @ a).norm()) for w, (b, a) in zip(case.weights, case.pairs, strict=True)]
    expected = torch.zeros(96, 8, dtype=torch.float64)
    for size, (b, _) in zip(sizes, case.pairs, strict=True):
        expected[:, : b.shape[1]] += size / sum(sizes) * b
    torch.testing.assert_close(after[B].double(), expected, rtol=1e-6, atol=1e-6)


def test_fedsvd_gives_a_weak_site_the_best_part_of_the_product(federation: Any, effect: Any) -> None:
    case = federation(common_a=True)
    after = case.aggregated(fedsvd())
    u, values, vt = np.linalg.svd(effect(after).numpy())
    best = (u[:, :3] * values[:3]) @ vt[:3]
    np.testing.assert_allclose(effect(cut(after, 3)).numpy(), best, atol=1e-5 * values[0])


@pytest.mark.parametrize(
    "strategy",
    [fedit(), fedsvd(), fedrot(), flora(), fedex(), flexlora(), hetlora()],
    ids=["fedit", "fedsvd", "fedrot", "flora", "fedex", "flexlora", "hetlora"],
)
def test_permuting_the_sites_changes_nothing(strategy: Any, federation: Any, effect: Any) -> None:
    case = federation()
    case = type(case)(strategy.initial(case.adapter), case.pairs, case.weights)
    forward, other = (
        effect(case.aggregated(strategy)),
        effect(case.aggregated(strategy, [3, 1, 4, 0, 5, 9, 2, 6, 8, 7])),
    )
    torch.testing.assert_close(forward, other, rtol=1e-5, atol=1e-5 * float(forward.abs().max()))


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({OFFSET: torch.zeros(96, 3)}, "missing_tensor"),
        ({OFFSET: torch.zeros(96, 3), RIGHT: torch.zeros(2, 80)}, "wrong_shape"),
        ({OFFSET: torch.zeros(95, 3), RIGHT: torch.zeros(3, 80)}, "wrong_shape"),
        ({OFFSET: torch.zeros(96, 81), RIGHT: torch.zeros(81, 80)}, "wrong_shape"),
        ({OFFSET: torch.zeros(96, 3).double(), RIGHT: torch.zeros(3, 80)}, "wrong_dtype"),
        ({OFFSET: torch.full((96, 3), torch.nan), RIGHT: torch.zeros(3, 80)}, "not_finite"),
        ({"other.lora_offset_left": torch.zeros(1, 1)}, "unknown_tensor"),
        ({"layer.control": torch.zeros(1)}, "unknown_tensor"),
    ],
)
def test_a_site_refuses_an_offset_that_does_not_fit(
    tensors: dict[str, torch.Tensor], code: str, federation: Any
) -> None:
    client = flora().client
    adapter = federation().adapter
    client.verify_extras({OFFSET: torch.zeros(96, 3), RIGHT: torch.zeros(3, 80)}, adapter)
    with pytest.raises(ReplyRejected) as caught:
        client.verify_extras(tensors, adapter)
    assert caught.value.code == code


def test_the_directions_of_the_drift_are_no_seeds_initial_factor() -> None:
    """A factor that is drawn like a direction would make an estimate blind to what lies across it."""
    width, rank = 48, 4
    adapter = {"m.lora_A.weight": torch.zeros(rank, width), "m.lora_B.weight": torch.zeros(5, rank)}
    directions = torch.nn.functional.normalize(Drift(adapter)._directions[width], dim=1)
    for seed in range(100):
        factor = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed))
        assert float((directions @ torch.nn.functional.normalize(factor, dim=1).T).abs().max()) < 0.8
