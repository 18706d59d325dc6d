"""Binary-tree aggregation (Kairouz et al. 2021, arXiv 2103.00039) with the streaming estimator of Honaker (2015).

Each complete dyadic interval of rounds is a node; C has one row per node, the indicator of its rounds. A prefix sum is
read off the nodes that make it up, and a node's noise is averaged with that of its children.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privacy.correlated.factorization import Draw
from privacy.correlated.participation import Participation
from protocol.errors import PrivacyError

__all__ = ["TreeAggregation"]

_MOST_WORK = 5e9
"""Additions; about ten seconds."""


@dataclass(frozen=True)
class TreeAggregation:
    """The tree over any number of rounds: the tree of 6 rounds has the nodes of 4, of 2, and all below them."""

    def sensitivity(self, participation: Participation) -> float:
        """Return the exact sensitivity: the largest Σ over nodes of (participations below the node)², its root.

        All entries of CᵀC are positive, so the worst unit always moves in the same direction, and only its pattern
        of rounds is to be found: by dynamic programming over the levels. All nodes of a level are alike.

        Raises:
            PrivacyError: so many rounds that this would take minutes.
        """
        gap = min(participation.min_separation, participation.rounds)
        if participation.rounds**2 * gap > 4 * _MOST_WORK:
            raise PrivacyError(
                f"the sensitivity of a tree over {participation.rounds} rounds with min_separation={gap} takes too "
                "long to find; use privacy/client_level_banded or privacy/client_level_blt"
            )
        node, size = _leaf(gap), 1
        forest, covered = np.zeros((1, gap, gap)), 0
        complete = {1: node}
        while 2 * size <= participation.rounds:
            node = _joined(node, size, node, size, participation.max_participations)
            node = node + (np.arange(len(node)) ** 2)[:, None, None]
            size *= 2
            complete[size] = node
        for size in sorted(complete, reverse=True):
            if participation.rounds & size:
                forest = _joined(forest, covered, complete[size], size, participation.max_participations)
                covered += size
        return float(np.sqrt(forest[:, 0, 0].max()))

    def prefix_variances(self, rounds: int) -> np.ndarray:
        """Return Σ over the nodes of each prefix of 1 / (2 - 1/size): the variance of the averaged node."""
        return np.array(
            [
                sum(1 / (2 - 0.5**level) for level in range(count.bit_length()) if count >> level & 1)
                for count in range(1, rounds + 1)
            ]
        )

    def start(self) -> TreeNoise:
        """Return the noise of a new run."""
        return TreeNoise()


class TreeNoise:
    """Keeps one noise vector per node of the current prefix: at most log2(rounds) + 1 of them, and their sum."""

    def __init__(self) -> None:
        self._nodes: list[tuple[int, np.ndarray]] = []
        self._released: np.ndarray | float = 0.0

    def next(self, draw: Draw) -> np.ndarray:
        """Return the noise of this prefix sum minus that of the last one."""
        level, noise = 0, draw()
        while self._nodes and self._nodes[-1][0] == level:
            _, left = self._nodes.pop()
            level += 1
            # Inverse-variance weights of the node itself and of the sum of its children (Honaker 2015, section 3).
            own = 1 / (2 - 0.5**level)
            noise = own * draw() + (1 - own) * (left + noise)
        self._nodes.append((level, noise))
        prefix = np.sum([node for _, node in self._nodes], axis=0)
        step = prefix - self._released
        self._released = prefix
        return step


# A table's entry [j, a, c] is the largest sum of squares for j participations in a stretch of rounds, none of them in
# its first a or its last c rounds; minus infinity where that cannot be. No participation at all is always possible.


def _leaf(gap: int) -> np.ndarray:
    table = np.full((2, gap, gap), -np.inf)
    table[0] = 0.0
    table[1, 0, 0] = 1.0
    return table


def _joined(left: np.ndarray, left_size: int, right: np.ndarray, right_size: int, most: int) -> np.ndarray:
    """Return the table of two neighboring stretches taken as one."""
    gap = left.shape[1]
    offsets = np.arange(gap)
    joined = np.full((min(len(left) + len(right) - 1, most + 1), gap, gap), -np.inf)
    within = min(len(left), len(joined))
    joined[:within] = left[:within][:, :, np.maximum(offsets - right_size, 0)]
    # A stretch without a participation leaves room of its whole length.
    within = min(len(right), len(joined))
    joined[:within] = np.maximum(joined[:within], right[:within][:, np.maximum(offsets - left_size, 0), :])
    for ours in range(1, len(left)):
        theirs = right[1 : len(joined) - ours]
        if len(theirs) == 0 or not np.isfinite(left[ours]).any():
            continue
        # `room` rounds stay free at the end of the left stretch, the others before the next participation to its right.
        target = joined[ours + 1 : ours + 1 + len(theirs), :left_size, :right_size]
        for room in range(max(gap - right_size, 0), min(gap, left_size)):
            pair = left[ours][:left_size, room, None] + theirs[:, None, gap - 1 - room, :right_size]
            np.maximum(target, pair, out=target)
    while len(joined) > 1 and not np.isfinite(joined[-1]).any():
        joined = joined[:-1]
    return joined
