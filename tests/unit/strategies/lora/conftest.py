"""Random factors, and the dense truth that aggregation rules are compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from protocol.tensors import NamedTensors
from strategies.base import Contribution, Strategy

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


@dataclass(frozen=True)
class Federation:
    """What sites received, what they hold after training, and their shares."""

    adapter: NamedTensors
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """(B (m x r), A (r x n)) of each site, float64."""
    weights: Sequence[float]

    @property
    def truth(self) -> torch.Tensor:
        """Σ pₖ BₖAₖ, dense, float64."""
        total = sum(self.weights)
        return sum((w / total * (b @ a) for w, (b, a) in zip(self.weights, self.pairs, strict=True)), torch.zeros(1))

    def contributions(self) -> list[Contribution]:
        """Each site's reply; a site of lower rank received a cut of the adapter."""
        return [
            Contribution(self._update(pair), weight, self._start(len(pair[1])))
            for pair, weight in zip(self.pairs, self.weights, strict=True)
        ]

    def aggregated(self, strategy: Strategy, order: Sequence[int] | None = None) -> NamedTensors:
        """The adapter after one step of `strategy`."""
        state = strategy.server.init(self.adapter)
        aggregator = strategy.server.aggregator(self.adapter, state)
        replies = self.contributions()
        for position in order or range(len(replies)):
            aggregator.accumulate(replies[position])
        return strategy.server.step(self.adapter, aggregator.result(), state)[0]

    def _start(self, rank: int) -> NamedTensors:
        return {A: self.adapter[A][:rank], B: self.adapter[B][:, :rank]}

    def _update(self, pair: tuple[torch.Tensor, torch.Tensor]) -> NamedTensors:
        start = self._start(len(pair[1]))
        return {B: (pair[0] - start[B]).to(start[B].dtype), A: (pair[1] - start[A]).to(start[A].dtype)}


@pytest.fixture(scope="session")
def federation() -> Callable[..., Federation]:
    """Return `make(sites=10, rank=8, m=96, n=80, spread=1.0, angle=0.0, ...)`.

    Sites start from a common pair and move by noise of relative size `spread`; then each turns its pair by a rotation
    of about `angle` radians, which changes no product.
    """

    def make(
        sites: int = 10,
        rank: int = 8,
        m: int = 96,
        n: int = 80,
        spread: float = 1.0,
        angle: float = 0.0,
        ranks: Sequence[int] | None = None,
        seed: int = 0,
        common_a: bool = False,
    ) -> Federation:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        adapter = {A: normal(rank, n), B: normal(m, rank)}
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for own in ranks or [rank] * sites:
            b = adapter[B][:, :own] + spread * normal(m, own)
            a = adapter[A][:own] + (0 if common_a else spread) * normal(own, n)
            skew = angle * normal(own, own)
            turn = torch.linalg.matrix_exp((skew - skew.T) / 2)
            pairs.append((b @ turn, turn.T @ a))
        weights = [1.0 + position for position in range(len(pairs))]
        return Federation(adapter, pairs, weights)

    return make


def dense(adapter: NamedTensors) -> torch.Tensor:
    """ΔW of the adapter's only layer, with what was folded into it, float64."""
    product = adapter[B].double() @ adapter[A].double()
    left, right = (adapter.get(f"layer.lora_offset_{side}") for side in ("left", "right"))
    return product if left is None or right is None else product + left.double() @ right.double()


def relative_error(adapter: NamedTensors, truth: torch.Tensor) -> float:
    """‖ΔW - truth‖ / ‖truth‖."""
    return float((dense(adapter) - truth).norm() / truth.norm())


@pytest.fixture(scope="session")
def error() -> Callable[[NamedTensors, torch.Tensor], float]:
    """Return the relative error of an adapter's effect."""
    return relative_error


@pytest.fixture(scope="session")
def effect() -> Callable[[NamedTensors], torch.Tensor]:
    """Return the dense ΔW of an adapter."""
    return dense
