"""Geometric median by smoothed Weiszfeld iterations (Pillutla et al. 2022, arXiv 1912.13445, algorithm 2).

Every iterate z = Σ wₖ xₖ is a mean of the updates, so its distances follow from the K x K inner products alone:
‖xₖ - z‖² = Gₖₖ - 2 (G w)ₖ + wᵀ G w. No vector is formed before the last one.
"""

from __future__ import annotations

import torch

from protocol.tensors import NamedTensors
from strategies.robust.updates import Updates

__all__ = ["geometric_median"]


def geometric_median(updates: Updates, iterations: int, smoothing: float) -> NamedTensors:
    """Return Σ wₖ xₖ after `iterations` of wₖ ∝ 1 / max(ν, ‖xₖ - z‖), with ν = `smoothing` x the median norm."""
    inner = updates.gram
    least = max(smoothing * float(inner.diagonal().clamp_min(0).sqrt().median()), torch.finfo(torch.float64).tiny)
    weights = torch.full((len(updates),), 1 / len(updates), dtype=torch.float64)
    for _ in range(iterations):
        pulled = inner @ weights
        distance = (inner.diagonal() - 2 * pulled + weights @ pulled).clamp_min(0).sqrt()
        weights = 1 / distance.clamp_min(least)
        weights /= weights.sum()
    return updates.combination(weights)
