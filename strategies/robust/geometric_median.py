"""Geometric median by smoothed Weiszfeld iterations (Pillutla et al. 2022, arXiv 1912.13445, algorithm 2).

Every iterate z = Σ wₖ xₖ is a mean of the updates, so its distances follow from the K x K inner products alone:
‖xₖ - z‖² = Gₖₖ - 2 (G w)ₖ + wᵀ G w. No vector is formed before the last one.
"""

from __future__ import annotations

import torch

from protocol.tensors import NamedTensors
from strategies.robust.updates import Updates, distances

__all__ = ["geometric_median"]


def geometric_median(updates: Updates, iterations: int, smoothing: float) -> NamedTensors:
    """Return Σ wₖ xₖ after `iterations` of wₖ ∝ 1 / max(ν, ‖xₖ - z‖), with ν = `smoothing` x the median norm."""
    inner = updates.gram
    least = max(smoothing * float(inner.diagonal().clamp_min(0).sqrt().median()), torch.finfo(torch.float64).tiny)
    weights = _start(distances(inner))
    for _ in range(iterations):
        pulled = inner @ weights
        distance = (inner.diagonal() - 2 * pulled + weights @ pulled).clamp_min(0).sqrt()
        weights = 1 / distance.clamp_min(least)
        weights /= weights.sum()
    return updates.combination(weights)


def _start(squared: torch.Tensor) -> torch.Tensor:
    """Return the weights of the mean of the closest majority: ⌊K/2⌋ + 1 updates around the one that needs least room.

    From the mean of all, an iteration moves only (K - f)/K of the way back from f updates that lie far away: whoever
    sends a large enough update would outlast any number of iterations.
    """
    majority = len(squared) // 2 + 1
    nearest = squared.sort(dim=1, stable=True)
    center = int(nearest.values[:, majority - 1].argmin())
    weights = torch.zeros(len(squared), dtype=torch.float64)
    weights[nearest.indices[center, :majority]] = 1 / majority
    return weights
