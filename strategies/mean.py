"""The weighted mean of updates (McMahan et al. 2017, arXiv 1602.05629, algorithm 1, server half)."""

from __future__ import annotations

import torch

from protocol.tensors import NamedTensors

__all__ = ["WeightedMean"]


class WeightedMean:
    """Σₖ wₖ Δₖ / Σₖ wₖ, summed in float64 so that the order of arrival does not show."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weight = 0.0

    def accumulate(self, update: NamedTensors, weight: float) -> None:
        """Fold one update; its weight is positive and finite."""
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight={weight} must be positive and finite")
        for name, tensor in update.items():
            term = tensor.double() * weight
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._weight += weight

    def result(self) -> NamedTensors:
        """Return the mean as float32."""
        if self._weight == 0:
            raise ValueError("there is no mean of no updates")
        return {name: (total / self._weight).float() for name, total in self._sums.items()}
