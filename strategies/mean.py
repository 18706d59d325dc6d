"""The weighted mean of updates (McMahan et al. 2017, arXiv 1602.05629, algorithm 1, server half)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from protocol.tensors import NamedTensors
from strategies.base import Contribution

__all__ = ["WeightedMean"]


class WeightedMean:
    """Σₖ wₖ Δₖ / Σₖ wₖ, summed in float64 so that the order of arrival does not show."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weight = 0.0

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one update; its weight is positive and finite."""
        weight = contribution.weight
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight={weight} must be positive and finite")
        for name, tensor in contribution.update.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
            self._sums[name].add_(tensor, alpha=weight)
        self._weight += weight

    def result(self) -> NamedTensors:
        """Return the mean as float32."""
        if self._weight == 0:
            raise ValueError("there is no mean of no updates")
        return {name: (total / self._weight).float() for name, total in self._sums.items()}

    def metrics(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}
