"""Matrix factorization mechanisms (Denisov et al. 2022, arXiv 2202.08312).

A run releases the prefix sums A x of its rounds' sums x (A: lower triangle of ones). With A = B C it publishes
B (C x + z), z independent Gaussian noise: post-processing of C x + z, one Gaussian mechanism, whose sensitivity is that
of C x under limits on participation (Choquette-Choo et al. 2023, arXiv 2211.06530). Seen round by round, round t's sum
gets the t-th entry of C⁻¹ z, which needs only noise drawn so far; the guarantee holds although later sums depend on
earlier releases (2202.08312, theorem 2.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from privacy.correlated.participation import Participation

__all__ = ["Draw", "Factorization", "RoundNoise"]

Draw = Callable[[], np.ndarray]
"""Returns a fresh standard normal float64 vector, one value per coordinate of the released sum."""


class RoundNoise(Protocol):
    """The noise of one run, round by round. Its state lives in memory, for this run only."""

    def next(self, draw: Draw) -> np.ndarray:
        """Return the next round's noise for z of unit variance, float64; the caller may overwrite it."""
        ...


class Factorization(Protocol):
    """One choice of C."""

    def sensitivity(self, participation: Participation) -> float:
        """Return the L2 sensitivity of C x for a unit whose contribution per round has norm at most 1."""
        ...

    def prefix_variances(self, rounds: int) -> np.ndarray:
        """Return the variance of the noise on each prefix sum, shape (rounds,), for z of unit variance."""
        ...

    def start(self) -> RoundNoise:
        """Return the noise of a new run."""
        ...
