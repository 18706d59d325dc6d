"""Norm bound (Sun et al. 2019, arXiv 1911.07963, section 5): x min(1, C / ‖x‖), then the strategy's own aggregator.

One update at a time: memory does not grow with the cohort. The norm is that of the factors and of the change of the
product together. What is left of the factors is never longer than C, whatever was sent. Of the product that holds where
one factor moves; where both do, the change is at most ‖dB‖ ‖A‖ + ‖B‖ ‖dA‖ + ‖dB‖ ‖dA‖ of what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from protocol.tensors import NamedTensors
from strategies.base import Aggregator, Contribution
from strategies.robust.geometry import gram

__all__ = ["NormBoundAggregator"]


class NormBoundAggregator:
    """Another aggregator, behind a bound."""

    def __init__(self, inner: Aggregator, adapter: NamedTensors, max_norm: float, *, products: bool) -> None:
        self._inner, self._adapter, self._max_norm, self._products = inner, adapter, max_norm, products
        self._count = self._shortened = 0

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one update, shortened where it is too long."""
        start = {**self._adapter, **contribution.start}
        norm = math.sqrt(max(float(gram([contribution.update], [start], products=self._products)), 0.0))
        share = min(1.0, self._max_norm / norm) if norm > 0 else 1.0
        bounded = {name: tensor * share for name, tensor in contribution.update.items()}
        self._inner.accumulate(replace(contribution, update=bounded))
        self._count += 1
        self._shortened += share < 1

    def result(self) -> NamedTensors:
        """Return the inner result."""
        return self._inner.result()

    def metrics(self) -> Mapping[str, float]:
        """Return the share of updates that were shortened."""
        share = self._shortened / self._count if self._count else 0.0
        return {**self._inner.metrics(), "shortened_share": share}
