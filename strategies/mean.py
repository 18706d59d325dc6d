"""The weighted mean of updates (McMahan et al. 2017, arXiv 1602.05629, algorithm 1, server half)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from protocol.tensors import NamedTensors, corner
from strategies.base import Contribution

__all__ = ["UpdateSum", "WeightedMean", "add_scaled", "checked_weight"]

_PIECE = 1 << 17
"""Values that are widened to float64 at a time: what is widened stays in the processor's cache."""


class UpdateSum:
    """Σₖ wₖ Δₖ, in float64 so that the order of arrival does not show; the memory does not grow with the cohort.

    An update may be smaller than the adapter's tensor where sites train at lower ranks: what it lacks counts as zero.
    """

    def __init__(self, adapter: NamedTensors | None = None) -> None:
        """Start empty; `adapter` gives each sum its shape, without it the first update does."""
        self._adapter = {} if adapter is None else adapter
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, update: NamedTensors, weight: float = 1.0) -> None:
        """Add weight · update."""
        for name, tensor in update.items():
            self.add_one(name, tensor, weight)

    def add_one(self, name: str, tensor: torch.Tensor, weight: float) -> None:
        """Add weight · one tensor of an update."""
        if name not in self.tensors:
            self.tensors[name] = torch.zeros(self._adapter.get(name, tensor).shape, dtype=torch.float64)
        add_scaled(corner(self.tensors[name], tensor.shape), tensor, weight)


class WeightedMean:
    """Σₖ wₖ Δₖ / Σₖ wₖ; sites may train at lower ranks (`UpdateSum`)."""

    def __init__(self, adapter: NamedTensors | None = None) -> None:
        """Start empty.

        Args:
            adapter: gives each sum its shape; without it all updates have the shapes of the first.
        """
        self._sum = UpdateSum(adapter)
        self._weight = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether nothing was accumulated."""
        return self._weight == 0

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one update; its weight is positive and finite."""
        weight = checked_weight(contribution.weight)
        self._sum.add(contribution.update, weight)
        self.count(weight)

    def add(self, name: str, tensor: torch.Tensor, weight: float) -> None:
        """Fold one tensor of an update; `count` follows when all are folded."""
        self._sum.add_one(name, tensor, weight)

    def count(self, weight: float) -> None:
        """Count an update whose tensors were folded."""
        self._weight += weight

    def result(self) -> NamedTensors:
        """Return the mean as float32."""
        if self.is_empty:
            raise ValueError("there is no mean of no updates")
        return {name: (total / self._weight).float() for name, total in self._sum.tensors.items()}

    def metrics(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}


def add_scaled(total: torch.Tensor, tensor: torch.Tensor, weight: float) -> None:
    """Add weight · tensor (float32) to `total` (float64, same shape) in place, bit for bit as torch's `add_` would.

    torch widens a whole tensor before it adds; of a large one that moves twice the bytes through memory.
    """
    if not (total.is_contiguous() and tensor.is_contiguous()):
        total.add_(tensor, alpha=weight)
        return
    for wide, narrow in zip(total.view(-1).split(_PIECE), tensor.view(-1).split(_PIECE), strict=True):
        wide.add_(narrow, alpha=weight)


def checked_weight(weight: float) -> float:
    """Return a weight that is positive and finite.

    Raises:
        ValueError: it is not.
    """
    if not 0 < weight < float("inf"):
        raise ValueError(f"weight={weight} must be positive and finite")
    return weight
