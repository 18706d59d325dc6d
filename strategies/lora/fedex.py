"""FedEx-LoRA: average the factors, fold what that misses into the base (Singhal et al., ACL 2025, arXiv 2410.09432)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from protocol.tensors import NamedTensors
from strategies.averaging import everything
from strategies.base import Contribution, Strategy
from strategies.lora.drift import MeasuredMean, trained_tensor
from strategies.lora.factors import lora_layers
from strategies.lora.stacks import FoldingClient, FoldingServer, offset_tensors

__all__ = ["fedex"]


def fedex() -> Strategy:
    """Return A ← Σ pₖ Aₖ, B ← Σ pₖ Bₖ and W₀ ← W₀ + s (Σ pₖ BₖAₖ - B̄Ā): the mean product, exactly.

    The residual (equation 6) is a covariance, Σ pₖ (Bₖ-B̄)(Aₖ-Ā), and the centered factors of K sites are K-1 free ones:
    with Σ pₖ (Bₖ-B̄) = 0 it is Σ_{k<K} pₖ (Bₖ-B̄)(Aₖ-A_K), of rank (K-1) r at most, stacked without any SVD. It joins the
    offset that every site trains beside.
    """
    return Strategy(
        is_linear=False,
        sensitivity="unbounded",
        post_processes_sum=False,
        server=FoldingServer(_Residual),
        client=FoldingClient(),
        trained=everything,
        uploaded=everything,
        downloaded=everything,
    )


class _Residual:
    """The mean of the factors, and the residual of the products. It keeps every site's factors."""

    def __init__(self, adapter: NamedTensors) -> None:
        self._adapter = adapter
        self._layers = lora_layers(frozenset(adapter))
        self._mean = MeasuredMean(adapter)
        self._kept: list[tuple[float, NamedTensors]] = []

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one site's update."""
        self._mean.accumulate(contribution)
        names = [name for layer in self._layers for name in (layer.zero, layer.random)]
        after = {name: trained_tensor(contribution, self._adapter, name) for name in names}
        self._kept.append((contribution.weight, after))

    def result(self) -> NamedTensors:
        """Return the mean update, and each layer's residual under the names of its offset."""
        update = self._mean.result()
        combined = dict(update)
        total = sum(weight for weight, _ in self._kept)
        if len(self._kept) == 1:
            return combined
        for layer in self._layers:
            mean = layer.read({name: self._adapter[name] + update[name] for name in (layer.zero, layer.random)})[0]
            pairs = [(weight / total, layer.read(after)) for weight, after in self._kept]
            anchor = pairs[-1][1][1]
            left = torch.cat([share * (b - mean) for share, (b, _) in pairs[:-1]], dim=1)
            right = torch.cat([a - anchor for _, (_, a) in pairs[:-1]])
            combined |= offset_tensors(layer.module, left, right)
        return combined

    def metrics(self) -> Mapping[str, float]:
        """Return the drift: the residual's size relative to the mean product."""
        return self._mean.metrics()
