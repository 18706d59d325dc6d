"""Coordinate median and trimmed mean (Yin et al. 2018, arXiv 1803.01498, definitions 1 and 2).

Coordinates are the factors' own: all sites of a round start from the same factors, and so share them.
"""

from __future__ import annotations

import torch

from protocol.tensors import NamedTensors
from strategies.robust.updates import Updates

__all__ = ["coordinate_median", "median", "trimmed_mean"]


def coordinate_median(updates: Updates) -> NamedTensors:
    """Return the median of each coordinate: between the honest values, for fewer attackers than half."""
    return {name: median(updates.stacked(name)).float() for name in sorted(updates.given[0])}


def trimmed_mean(updates: Updates, trimmed: int) -> NamedTensors:
    """Return the mean of each coordinate without the `trimmed` lowest and highest: 2 · trimmed < K."""
    kept = slice(trimmed, len(updates) - trimmed)
    return {
        name: updates.stacked(name).sort(dim=0).values[kept].mean(dim=0).float() for name in sorted(updates.given[0])
    }


def median(values: torch.Tensor) -> torch.Tensor:
    """Return the median over the first dimension; of an even number, the mean of the middle two."""
    ordered, count = values.sort(dim=0).values, values.shape[0]
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
