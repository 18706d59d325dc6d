"""A budget that holds when each step's parameters are chosen after seeing the outputs of the steps before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from privacy.mechanisms import SubsampledGaussian
from privacy.renyi import conversion, order_costs
from protocol.errors import PrivacyError

__all__ = ["RenyiFilter"]

_ORDERS = range(2, 1025)
_SHARE, _SHARE_OF_EXPECTED = 0.85, 0.95


@dataclass(frozen=True)
class RenyiFilter:
    """Admits steps while their Rényi costs at one fixed order stay within what (`epsilon`, `delta`) leaves.

    Rényi costs at one order may be summed as if they had been fixed in advance, although each was chosen adaptively, as
    long as the sum is never let above a limit that was: Feldman and Zrnic 2021 (arXiv 2008.11193), sections 3 and 4;
    Lécuyer 2021 (arXiv 2103.01379). No such theorem is known for privacy loss distributions, and a bound that is good
    for fixed parameters may fail for adaptive ones (Rogers et al. 2016, arXiv 1605.08294): a schedule that was not
    declared beforehand is admitted here and nowhere else.

    The order follows from (`epsilon`, `delta`) and the step that is `expected`, which must be known before the first
    output; so nobody can choose it after the fact. It is the smallest at which at least 95 percent of the most expected
    steps fit that fit at any order. Without an expectation, unsampled Gaussian steps are taken for it, whose cost is in
    proportion to the order, and 85 percent. Smaller is safer: below the best order a few sampled steps fewer fit, above
    it their cost grows exponentially. It is an integer, at which the cost of sampled discrete noise is exact.

    An order that is `kept` from another (ε, δ) takes the place of all that; see `restated`.

    Raises:
        PrivacyError: an ε or δ for which no order leaves anything.
    """

    epsilon: float
    delta: float
    expected: SubsampledGaussian | None = None
    kept: int | None = None

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and 0 < self.delta < 1):
            raise PrivacyError(f"a filter needs epsilon > 0 and 0 < delta < 1, not ({self.epsilon}, {self.delta})")
        if self.kept is None and max(map(self._limit_at, _ORDERS)) <= 0:
            raise PrivacyError(
                f"a budget of epsilon={self.epsilon:g} at delta={self.delta:g} leaves nothing for adaptive choices at "
                f"any Rényi order up to {_ORDERS[-1]}; raise the budget or declare the schedule before the run"
            )

    @cached_property
    def order(self) -> int:
        """The Rényi order α at which everything is counted."""
        if self.kept is not None:
            return self.kept
        limits = np.array([self._limit_at(order) for order in _ORDERS])
        fitting, share = limits / np.array(_ORDERS), _SHARE
        if self.expected is not None and self.expected.steps and self.expected.noise_multiplier:
            fitting, share = limits / order_costs([self.expected.repeated(1)], _ORDERS), _SHARE_OF_EXPECTED
        return _ORDERS[int(np.argmax(fitting >= share * fitting.max()))]

    def restated(self, epsilon: float, delta: float) -> RenyiFilter:
        """Return the filter for another (ε, δ), with this one's order: costs that were counted at it stay comparable.

        Where the order leaves nothing of so small an ε, the limit is not positive and admits nothing.
        """
        return replace(self, epsilon=epsilon, delta=delta, kept=self.order)

    @property
    def limit(self) -> float:
        """The largest admissible sum of Rényi costs."""
        return self._limit_at(self.order)

    def cost(self, mechanisms: Iterable[SubsampledGaussian]) -> float:
        """Return the sum of the mechanisms' Rényi costs at the filter's order."""
        return float(order_costs(mechanisms, [self.order])[0])

    def admits(self, mechanisms: Iterable[SubsampledGaussian]) -> bool:
        """Return whether `mechanisms`, all that was executed and what is asked for next, stay within the limit."""
        return self.cost(mechanisms) <= self.limit

    def epsilon_of(self, mechanisms: Iterable[SubsampledGaussian]) -> float:
        """Return the ε at the filter's δ that the sum of costs amounts to; below the budget as long as it admits them.

        The promise of the whole adaptive run is `epsilon`, fixed beforehand. This is information on the way (an
        odometer), and no promise of its own.
        """
        cost = self.cost(mechanisms)
        return max(0.0, cost + float(conversion(self.order, self.delta))) if cost else 0.0

    def _limit_at(self, order: int) -> float:
        return self.epsilon - float(conversion(order, self.delta))
