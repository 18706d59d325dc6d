"""FedNova (Wang et al. 2020, arXiv 2007.07481, equation 7): x ← x + τ_eff Σ pₖ Δₖ / τₖ, with τ_eff = Σ pₖ τₖ.

τₖ is what the site's optimizer made of its steps (`local_steps.py`). With equal steps it is the weighted mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from protocol.tensors import NamedTensors
from strategies.base import Aggregator, Contribution, Names, ServerHalf, ServerState

__all__ = ["NormalizedServer"]


@dataclass(frozen=True)
class NormalizedServer:
    """Another server half, fed with updates per step."""

    inner: ServerHalf

    def init(self, adapter: NamedTensors) -> ServerState:
        """Return the inner state."""
        return self.inner.init(adapter)

    def download(self, adapter: NamedTensors, state: ServerState, names: Names, rank: int | None) -> NamedTensors:
        """Return what the inner half sends."""
        return self.inner.download(adapter, state, names, rank)

    def aggregator(self, adapter: NamedTensors, state: ServerState) -> Aggregator:
        """Return an aggregator that normalizes."""
        return _NormalizedAggregator(self.inner.aggregator(adapter, state))

    def step(
        self, adapter: NamedTensors, combined: NamedTensors, state: ServerState
    ) -> tuple[NamedTensors, ServerState]:
        """Return the inner step."""
        return self.inner.step(adapter, combined, state)


class _NormalizedAggregator:
    def __init__(self, inner: Aggregator) -> None:
        self._inner = inner
        self._weight = self._weighted_steps = 0.0

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one update, divided by its steps.

        Raises:
            ValueError: a weight or a number of steps that is not positive and finite.
        """
        steps = contribution.effective_steps
        if not 0 < steps < float("inf"):
            raise ValueError(f"effective_steps={steps} must be positive and finite")
        per_step = {name: tensor / steps for name, tensor in contribution.update.items()}
        self._inner.accumulate(replace(contribution, update=per_step))
        self._weight += contribution.weight
        self._weighted_steps += contribution.weight * steps

    def result(self) -> NamedTensors:
        """Return the mean update per step, times the mean number of steps."""
        combined = self._inner.result()
        effective = self._weighted_steps / self._weight
        return {name: tensor * effective for name, tensor in combined.items()}

    def metrics(self) -> Mapping[str, float]:
        """Return nothing: what the inner aggregator measures is of updates per step, which no adapter is made of."""
        return {}
