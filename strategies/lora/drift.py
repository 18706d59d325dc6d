"""How far the mean of the factors is from the mean of the products: what averaging A and B apart costs in a round.

Σ pₖ BₖAₖ - B̄Ā = Σ pₖ (Bₖ-B̄)(Aₖ-Ā), a covariance. Its Frobenius norm over that of Σ pₖ BₖAₖ is logged. It is estimated
from a few random directions Ω, ‖C‖² ≈ ‖CΩ‖²/s (Hutchinson's estimator), because CΩ is a sum over sites: the memory does
not grow with the cohort, and the work is s multiplications per value of an update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from protocol.tensors import NamedTensors, corner
from strategies.base import Contribution
from strategies.lora.factors import LoraLayer, lora_layers
from strategies.mean import WeightedMean

__all__ = ["DRIFT", "Drift", "MeasuredMean", "trained_tensor"]

DRIFT = "factor_drift"
_DIRECTIONS = 4


class Drift:
    """The running estimate of one round."""

    def __init__(self, adapter: NamedTensors) -> None:
        self._adapter = adapter
        self._layers = lora_layers(frozenset(adapter))
        # Public directions, the same for layers of one width: each layer's estimate is unbiased by itself.
        generator = torch.Generator().manual_seed(0)
        widths = sorted({layer.read(adapter, torch.float32)[1].shape[1] for layer in self._layers})
        self._directions = {width: torch.randn(width, _DIRECTIONS, generator=generator) for width in widths}
        self._products: dict[str, torch.Tensor] = {}
        self._weight = 0.0

    def accumulate(self, contribution: Contribution) -> None:
        """Fold the product of one site's factors, of the layers where both were trained."""
        for layer in self._layers:
            if layer.zero not in contribution.update or layer.random not in contribution.update:
                continue
            after = {name: trained_tensor(contribution, self._adapter, name) for name in (layer.zero, layer.random)}
            left, right = layer.read(after, torch.float32)
            seen = left @ (right @ self._directions[right.shape[1]])
            total = self._products.setdefault(layer.module, torch.zeros(seen.shape, dtype=torch.float64))
            total.add_(seen, alpha=contribution.weight)
        self._weight += contribution.weight

    def relative(self, mean: NamedTensors) -> float:
        """Return ‖Σ pₖ BₖAₖ - B̄Ā‖ / ‖Σ pₖ BₖAₖ‖, given B̄ and Ā; 0 where the products are zero."""
        gap = size = 0.0
        for layer in self._layers:
            if layer.module not in self._products:
                continue
            product = self._products[layer.module] / self._weight
            gap += float((product - self._seen(layer, mean)).square().sum())
            size += float(product.square().sum())
        return math.sqrt(gap / size) if size > 0 else 0.0

    def _seen(self, layer: LoraLayer, tensors: NamedTensors) -> torch.Tensor:
        left, right = layer.read(tensors)
        return left @ (right @ self._directions[right.shape[1]].double())


class MeasuredMean:
    """The weighted mean, and the drift of the updates that went into it."""

    def __init__(self, adapter: NamedTensors) -> None:
        self._adapter = adapter
        self._mean, self._drift = WeightedMean(adapter), Drift(adapter)

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one update."""
        self._mean.accumulate(contribution)
        self._drift.accumulate(contribution)

    def result(self) -> NamedTensors:
        """Return the mean as float32."""
        return self._mean.result()

    def metrics(self) -> Mapping[str, float]:
        """Return the drift; nothing where no update was folded."""
        if self._mean.is_empty:
            return {}
        update = self._mean.result()
        return {DRIFT: self._drift.relative({name: self._adapter[name] + update[name] for name in update})}


def trained_tensor(contribution: Contribution, adapter: NamedTensors, name: str) -> torch.Tensor:
    """Return a site's tensor after training: what it started from is what it was sent, or a cut of the initial one."""
    update = contribution.update[name]
    return contribution.start.get(name, corner(adapter[name], update.shape)) + update
