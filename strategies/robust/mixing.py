"""Mixing updates before a rule sees them, so that honest sites look more alike."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import assert_never

import torch

from conf.schema.robust import Bucketing, Mixing, NearestNeighbors, NoMixing
from protocol.tensors import digest
from strategies.robust.updates import Updates, distances

__all__ = ["mixed"]


def mixed(updates: Updates, config: Mixing, attackers: int) -> Updates:
    """Return the updates as a rule is to see them."""
    match config:
        case NoMixing():
            return updates
        case Bucketing():
            return replace(updates, mixing=_buckets(updates, config.size))
        case NearestNeighbors():
            return replace(updates, mixing=_neighbors(updates, attackers))
        case _:
            assert_never(config)


def _buckets(updates: Updates, size: int) -> torch.Tensor:
    """Bucketing (Karimireddy et al. 2022, arXiv 2006.09365, algorithm 1): means of `size` updates at random.

    The permutation follows from a digest of all updates: the same updates are mixed alike, and no site can choose its
    bucket without knowing every other site's update.
    """
    count = len(updates.given)
    seed = hashlib.sha256("".join(digest(update) for update in updates.given).encode()).hexdigest()
    order = list(range(count))
    random.Random(seed).shuffle(order)
    buckets = [order[first : first + size] for first in range(0, count, size)]
    mixing = torch.zeros(len(buckets), count, dtype=torch.float64)
    for row, members in enumerate(buckets):
        mixing[row, members] = 1 / len(members)
    return mixing


def _neighbors(updates: Updates, attackers: int) -> torch.Tensor:
    """Nearest-neighbor mixing (Allouah et al. 2023, arXiv 2302.01772, algorithm 2): means of the K - f nearest."""
    count = len(updates.given)
    near = distances(updates.given_gram[:count, :count])
    mixing = torch.zeros(count, count, dtype=torch.float64)
    kept = max(count - attackers, 1)
    for row in range(count):
        mixing[row, near[row].argsort(stable=True)[:kept]] = 1 / kept
    return mixing
