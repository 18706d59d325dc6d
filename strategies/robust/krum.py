"""Krum and Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757, section 4 and 5), and Bulyan on top of them
(El Mhamdi et al. 2018, arXiv 1802.07927, section 4)."""

from __future__ import annotations

import torch

from protocol.tensors import NamedTensors
from strategies.robust.coordinatewise import median
from strategies.robust.updates import Updates, distances

__all__ = ["bulyan", "multi_krum", "selected_by_krum"]


def selected_by_krum(updates: Updates, attackers: int, count: int) -> list[int]:
    """Return the `count` updates with the least sum of squared distances to their K - f - 2 nearest neighbors."""
    near = distances(updates.gram).sort(dim=1).values
    neighbors = max(1, len(updates) - attackers - 2)
    scores = near[:, 1 : neighbors + 1].sum(dim=1)  # the nearest to an update is itself
    return scores.argsort(stable=True)[:count].tolist()


def multi_krum(updates: Updates, attackers: int, count: int) -> NamedTensors:
    """Return the mean of the selected updates; of one, Krum."""
    weights = torch.zeros(len(updates), dtype=torch.float64)
    weights[selected_by_krum(updates, attackers, count)] = 1 / count
    return updates.combination(weights)


def bulyan(updates: Updates, attackers: int) -> NamedTensors:
    """Return, of θ = K - 2f updates, the mean of the θ - 2f values of each coordinate nearest to their median.

    The θ updates are those with the lowest Krum scores, as Flower has it; the paper selects one at a time, anew.
    """
    theta = len(updates) - 2 * attackers
    beta = theta - 2 * attackers
    selected = selected_by_krum(updates, attackers, theta)
    result: dict[str, torch.Tensor] = {}
    for name in sorted(updates.given[0]):
        values = updates.stacked(name)[selected]
        nearest = (values - median(values)).abs().argsort(dim=0, stable=True)[:beta]
        result[name] = values.gather(0, nearest).mean(dim=0).float()
    return result
