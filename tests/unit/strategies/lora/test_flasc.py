"""FLASC: what is selected, what is sent, and what the server keeps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.schema.federation import LocalTraining
from conf.schema.strategy import FLASC, FedIT
from privacy.client_level import clip_update
from protocol.tensors import NamedTensors, add
from strategies.base import Contribution, LocalStart, Strategy
from strategies.build import build_strategy
from strategies.lora.flasc import largest

A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "score.weight"


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) for name, shape in ((A, (4, 10)), (B, (6, 4)), (HEAD, (2, 3)))
    }


def norm(update: NamedTensors) -> float:
    """The norm without rounding but the last: the order of a sum must not decide a comparison."""
    return math.sqrt(math.fsum(float(value) ** 2 for tensor in update.values() for value in tensor.flatten()))


def sent_by(strategy: Strategy, start: NamedTensors, after: NamedTensors) -> NamedTensors:
    names = frozenset(start)
    return strategy.client.begin(LocalStart(start, {}, {}, names, names, LocalTraining(), 1.0)).finish(after).update


@given(st.integers(0, 999), st.floats(0.001, 1))
def test_the_largest_values_of_all_factors_together_are_kept(seed: int, density: float) -> None:
    given_to_it = tensors(seed)
    chosen = largest(given_to_it, density)
    flat = torch.cat([given_to_it[name].flatten() for name in (A, B)])
    kept = torch.cat([chosen[name].flatten() for name in (A, B)])
    wanted = math.ceil(density * flat.numel())
    assert int((kept != 0).sum()) == wanted
    assert torch.equal(kept[kept != 0], flat[kept != 0])
    assert kept[kept != 0].abs().min() >= flat[kept == 0].abs().max() if wanted < flat.numel() else True
    assert torch.equal(chosen[HEAD], given_to_it[HEAD]), "a head travels whole"


def test_of_equal_values_the_first_are_kept() -> None:
    chosen = largest({A: torch.tensor([[1.0, -1.0, 2.0]]), B: torch.tensor([[1.0], [-1.0]])}, 0.5)
    assert torch.equal(chosen[A], torch.tensor([[1.0, -1.0, 2.0]]))
    assert torch.equal(chosen[B], torch.zeros(2, 1))


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(odd: float) -> None:
    given_to_it = tensors(1)
    given_to_it[B][2, 1] = odd
    assert not math.isfinite(largest(given_to_it, 0.01)[B][2, 1])


@given(st.integers(0, 999), st.floats(0.001, 1), st.floats(0.01, 10))
def test_a_selection_never_raises_a_norm_before_or_after_the_clip(seed: int, density: float, clip: float) -> None:
    update = tensors(seed)
    assert norm(largest(update, density)) <= norm(update)
    assert norm(clip_update(largest(update, density), clip)[0]) <= clip * (1 + 1e-6)


def test_both_ways_are_sparse_and_the_server_stays_dense() -> None:
    strategy, adapter = build_strategy(FLASC(download_density=0.25, upload_density=0.125)), tensors(1)
    state = strategy.server.init(adapter)
    start = strategy.server.download(adapter, state, frozenset(adapter), None)
    update = sent_by(strategy, start, add(start, tensors(2)))
    assert [sum(int((each[name] != 0).sum()) for name in (A, B)) for each in (start, update)] == [16, 8]
    aggregator = strategy.server.aggregator(adapter, state)
    aggregator.accumulate(Contribution(update, 3.0, start))
    assert aggregator.metrics()["factor_drift"] < 1e-6, "one site alone does not drift"
    after, _ = strategy.server.step(adapter, aggregator.result(), state)
    for name in adapter:
        torch.testing.assert_close(after[name], adapter[name] + update[name])


def test_at_full_density_it_is_fedit() -> None:
    adapter, afters = tensors(1), list[NamedTensors]()
    for strategy in (build_strategy(FLASC()), build_strategy(FedIT())):
        state = strategy.server.init(adapter)
        start = strategy.server.download(adapter, state, frozenset(adapter), None)
        aggregator = strategy.server.aggregator(adapter, state)
        for seed in (2, 3):
            aggregator.accumulate(Contribution(sent_by(strategy, start, add(start, tensors(seed))), seed, start))
        afters.append(strategy.server.step(adapter, aggregator.result(), state)[0])
    assert all(torch.equal(afters[0][name], afters[1][name]) for name in adapter)
