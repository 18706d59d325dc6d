"""How far the mean of the factors is from the mean of the products: what averaging A and B apart costs in a round.

Sites move from a common pair, Bₖ = B + ΔBₖ and Aₖ = A + ΔAₖ, so Σ pₖ BₖAₖ - B̄Ā = Σ pₖ ΔBₖΔAₖ - ΔB̄ΔĀ = C, a covariance
of what they send. ‖C‖ / ‖B̄Ā + C‖ is logged. An exact ‖C‖ needs the products of all pairs of sites, so all factors at
once; it is estimated from a few random directions Ω, ‖C‖² ≈ ‖CΩ‖²/s (Hutchinson's estimator), because CΩ is a sum
over sites: two thin products per layer and site, without a copy, in memory that does not grow with the cohort.

It is about what is averaged: where updates are scaled before they are added (a norm bound, a stale reply of a buffer),
about the scaled moves from the server's adapter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch

from protocol.tensors import NamedTensors, corner
from strategies.base import Contribution
from strategies.lora.factors import LoraLayer, lora_layers
from strategies.mean import WeightedMean, checked_weight

__all__ = ["DRIFT", "Drift", "MeasuredMean", "trained_tensor"]

DRIFT = "factor_drift"
_DIRECTIONS = 4
_DIRECTION_SEED = int.from_bytes(hashlib.sha256(b"directions of the drift").digest()[:7])


class Drift:
    """The running estimate of one round."""

    def __init__(self, adapter: NamedTensors) -> None:
        self._adapter = adapter
        self.layers = lora_layers(frozenset(adapter))
        # Public directions, the same for layers of one width: each layer's estimate is unbiased by itself. They are
        # rows, and so are the products with them: BLAS takes several times as long for thin columns.
        # An adapter's own seed may be any small number, and its random factor must not be one of the directions.
        generator = torch.Generator().manual_seed(_DIRECTION_SEED)
        widths = sorted({layer.read(adapter, torch.float32)[1].shape[1] for layer in self.layers})
        self._directions = {width: torch.randn(_DIRECTIONS, width, generator=generator) for width in widths}
        self._products: dict[str, torch.Tensor] = {}
        self._weight = 0.0

    def add(self, layer: LoraLayer, update: NamedTensors, weight: float) -> None:
        """Fold the product of one site's moves of a layer; `count` follows when all are folded."""
        left, right = layer.read(update, torch.float32)
        if layer.module not in self._products:
            self._products[layer.module] = left.new_zeros(_DIRECTIONS, left.shape[0])
        self._products[layer.module].addmm_(self._directions[right.shape[1]] @ right.T, left.T, alpha=weight)

    def count(self, weight: float) -> None:
        """Count a site whose layers were folded."""
        self._weight += weight

    def relative(self, update: NamedTensors) -> float:
        """Return ‖C‖ / ‖B̄Ā + C‖, given ΔB̄ and ΔĀ; 0 where that product is zero."""
        gap = size = 0.0
        after = {name: self._adapter[name] + tensor for name, tensor in update.items() if name in self._adapter}
        for layer in self.layers:
            if layer.module not in self._products:
                continue
            missed = self._products[layer.module].double() / self._weight - self._seen(layer, update)
            gap += float(missed.square().sum())
            size += float((self._seen(layer, after) + missed).square().sum())
        return math.sqrt(gap / size) if size > 0 else 0.0

    def _seen(self, layer: LoraLayer, tensors: NamedTensors) -> torch.Tensor:
        left, right = layer.read(tensors)
        return self._directions[right.shape[1]].double() @ right.T @ left.T


class MeasuredMean:
    """The weighted mean, and the drift of the updates that went into it."""

    def __init__(self, adapter: NamedTensors) -> None:
        self._mean, self._drift = WeightedMean(adapter), Drift(adapter)

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one update, layer by layer: what was just added up is still in the processor's cache."""
        weight, left = checked_weight(contribution.weight), dict(contribution.update)
        for layer in self._drift.layers:
            # A round may train one factor of a layer alone.
            if layer.zero in left and layer.random in left:
                for name in (layer.zero, layer.random):
                    self._mean.add(name, left.pop(name), weight)
                self._drift.add(layer, contribution.update, weight)
        for name, tensor in left.items():
            self._mean.add(name, tensor, weight)
        self._mean.count(weight)
        self._drift.count(weight)

    def result(self) -> NamedTensors:
        """Return the mean as float32."""
        return self._mean.result()

    def metrics(self) -> Mapping[str, float]:
        """Return the drift; nothing where no update was folded."""
        return {} if self._mean.is_empty else {DRIFT: self._drift.relative(self._mean.result())}


def trained_tensor(contribution: Contribution, adapter: NamedTensors, name: str) -> torch.Tensor:
    """Return a site's tensor after training: what it started from is what it was sent, or a cut of the initial one."""
    update = contribution.update[name]
    return contribution.start.get(name, corner(adapter[name], update.shape)) + update
