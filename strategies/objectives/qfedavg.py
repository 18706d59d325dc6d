"""q-FedAvg (Li et al. 2020, arXiv 1905.10497, algorithm 2): x ← x + Σ Fₖ^q L Δₖ / Σ (q Fₖ^(q-1) ‖L Δₖ‖² + L Fₖ^q).

L is one over the local learning rate; with heavy-ball momentum over ‖a‖₁ / steps times that (`local_steps.py`), that is
how far one step goes. AdamW has no such rate, and is refused. Fₖ is the mean training loss of the round, as the site
released it: exact where nothing is protected, noised and paid for where it is (`privacy.loss_noise_multiplier`). The
paper takes the loss at x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from protocol.errors import ReplyRejected
from protocol.metrics import check_metric
from protocol.tensors import NamedTensors
from strategies.base import Aggregator, Contribution, Names, ServerHalf, ServerState
from strategies.mean import UpdateSum, checked_weight

__all__ = ["FairServer"]

_LEAST_LOSS = 1e-10
"""Noise can make a loss negative, and a loss of zero would count for nothing."""


@dataclass(frozen=True)
class FairServer:
    """Another server half, whose sites count by their loss."""

    inner: ServerHalf
    q: float

    def init(self, adapter: NamedTensors) -> ServerState:
        """Return the inner state."""
        return self.inner.init(adapter)

    def download(self, adapter: NamedTensors, state: ServerState, names: Names, rank: int | None) -> NamedTensors:
        """Return what the inner half sends."""
        return self.inner.download(adapter, state, names, rank)

    def aggregator(self, adapter: NamedTensors, state: ServerState) -> Aggregator:
        """Return an aggregator that weighs by loss."""
        return _FairAggregator(self.q)

    def step(
        self, adapter: NamedTensors, combined: NamedTensors, state: ServerState
    ) -> tuple[NamedTensors, ServerState]:
        """Return the inner step."""
        return self.inner.step(adapter, combined, state)


class _FairAggregator:
    def __init__(self, q: float) -> None:
        self._q = q
        self._sum = UpdateSum()
        self._normalizer = 0.0

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one update.

        Raises:
            ValueError: a weight that is not positive and finite.
            ReplyRejected: code `no_loss`, for a site that released none; `wrong_metric`, for one so large that F^q
                would overflow, and end the run for all.
        """
        weight = checked_weight(contribution.weight)
        name = "training_loss" if "training_loss" in contribution.metrics else "noisy_training_loss"
        released = contribution.metrics.get(name)
        if released is None:
            raise ReplyRejected("no_loss", "objective=qfedavg needs a training loss and the site released none")
        check_metric(name, released)
        rate = contribution.learning_rate * contribution.effective_steps / contribution.steps
        loss, lipschitz = max(released, 0.0) + _LEAST_LOSS, 1 / rate
        norm = lipschitz**2 * sum(float(tensor.double().square().sum()) for tensor in contribution.update.values())
        factor = loss**self._q
        self._sum.add(contribution.update, lipschitz * factor * weight)
        self._normalizer += weight * (self._q * loss ** (self._q - 1) * norm + lipschitz * factor)

    def result(self) -> NamedTensors:
        """Return the combined update as float32."""
        if self._normalizer == 0:
            raise ValueError("there is no mean of no updates")
        return {name: (total / self._normalizer).float() for name, total in self._sum.tensors.items()}

    def metrics(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}
