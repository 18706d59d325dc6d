"""From the configuration of a cohort's noise to its factorization."""

from __future__ import annotations

from conf.schema.privacy import Banded, Blt, Tree
from privacy.correlated.blt import optimal_blt
from privacy.correlated.factorization import Factorization
from privacy.correlated.participation import Participation
from privacy.correlated.toeplitz import BandedToeplitz, square_root
from privacy.correlated.tree import TreeAggregation

__all__ = ["INDEPENDENT", "build_factorization"]

INDEPENDENT = BandedToeplitz((1.0,))
"""C = I: fresh noise in every round."""


def build_factorization(config: Tree | Banded | Blt, participation: Participation) -> Factorization:
    """Return the factorization that a validated configuration names."""
    match config:
        case Tree():
            return TreeAggregation()
        case Banded():
            return BandedToeplitz(square_root(config.bands or min(participation.min_separation, participation.rounds)))
        case Blt():
            return optimal_blt(config.buffers, participation)
