"""Each rule against the dense truth Σ pₖ BₖAₖ, in double precision, on random factors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conf.schema.federation import LocalTraining
from strategies.base import Contribution, LocalStart
from strategies.lora.drift import DRIFT
from strategies.lora.fedit import fedit
from strategies.lora.fedrot import aligned, fedrot
from strategies.lora.fedsa import fedsa
from strategies.lora.fedsvd import fedsvd
from strategies.lora.ffa_lora import ffa_lora
from strategies.lora.rolora import rolora
from strategies.lora.spectral import truncated

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


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
    from strategies.lora.drift import MeasuredMean

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
