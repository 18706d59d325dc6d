"""Centered clipping (Karimireddy et al. 2021, arXiv 2012.10333, algorithm 2).

v ← v + (1/K) Σ (xₖ - v) min(1, τ / ‖xₖ - v‖), from the last round's result (zero before round 1). One update moves v by
at most τ / K in each iteration, whatever it is: distances are at least those of the factors, which are averaged.
"""

from __future__ import annotations

import torch

from protocol.tensors import NamedTensors
from strategies.robust.updates import Updates

__all__ = ["centered_clipping"]


def centered_clipping(updates: Updates, radius: float, iterations: int) -> NamedTensors:
    """Return v as a weighted sum of the updates and the reference, which is the last round's v."""
    inner, count = updates.gram, len(updates)
    weights = torch.zeros(inner.shape[0], dtype=torch.float64)
    weights[count:] = 1  # the reference, where there is one; without it v starts at zero
    for _ in range(iterations):
        pulled = inner @ weights
        distance = (inner.diagonal() - 2 * pulled + weights @ pulled).clamp_min(0).sqrt()[:count]
        shares = (radius / distance.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1) / count
        weights = weights * (1 - shares.sum())
        weights[:count] += shares
    return updates.combination(weights)
