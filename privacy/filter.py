"""A privacy filter: how much may be spent when every step's parameters may depend on all earlier outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant

from privacy.mechanisms import SubsampledGaussian

__all__ = ["RenyiFilter"]


class RenyiFilter:
    """The Rényi filter (Feldman and Zrnic 2021, arXiv 2008.11193, Theorem 4.3) of one order, fixed in advance.

    Steps are admitted while the sum of their Rényi costs stays below ε - log(1/δ) / (α - 1).
    """

    def __init__(self, epsilon: float, delta: float) -> None:
        # The order at which a single Gaussian of this (ε, δ) converts best.
        self.order = 1 + (math.log(1 / delta) + math.sqrt(math.log(1 / delta) * (math.log(1 / delta) + epsilon))) / (
            epsilon
        )
        self._conversion = math.log(1 / delta) / (self.order - 1)
        self.limit = epsilon - self._conversion

    def cost(self, mechanisms: Iterable[SubsampledGaussian]) -> float:
        """Return the sum of the Rényi costs at the filter's order."""
        total = 0.0
        for mechanism in mechanisms:
            if mechanism.steps:
                if mechanism.noise_multiplier == 0:
                    return math.inf
                accountant = RdpAccountant([self.order])
                gaussian = GaussianDpEvent(mechanism.noise_multiplier)
                accountant.compose(PoissonSampledDpEvent(mechanism.sampling_rate, gaussian), mechanism.steps)
                total += float(accountant.rdp[0])
        return total

    def admits(self, mechanisms: Iterable[SubsampledGaussian]) -> bool:
        """Return whether all of these together stay within the limit."""
        return self.cost(mechanisms) <= self.limit

    def epsilon(self, mechanisms: Iterable[SubsampledGaussian]) -> float:
        """Return the ε that holds for these, however adaptively they were chosen; 0 for none."""
        cost = self.cost(mechanisms)
        return cost + self._conversion if cost > 0 else 0.0
