"""HetLoRA: pad lower ranks with zeros, weigh sites by the size of their product (Cho et al. 2024, arXiv 2401.06432)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from protocol.tensors import NamedTensors, corner
from strategies.averaging import Averaging, PlainClient, everything
from strategies.base import Contribution, Strategy
from strategies.lora.drift import trained_tensor
from strategies.lora.factors import lora_layers, no_factors
from strategies.lora.spectral import product_norm
from strategies.mean import WeightedMean

__all__ = ["hetlora"]


def hetlora() -> Strategy:
    """Return B ← Σ qₖ pad(Bₖ) and A ← Σ qₖ pad(Aₖ), with qₖ ∝ pₖ ‖BₖAₖ‖_F over all layers (section 3.2).

    A site whose product is small, as that of a low rank is, counts less, so that zeros thin out less of what higher
    ranks learned. A site of rank rₖ gets the first rₖ components. The self-pruning of ranks is left out: it would tell
    the server something of the records. Averaging two factors misses their covariance, as in FedIT.
    """
    return Strategy(
        is_linear=False,
        sensitivity="unbounded",
        post_processes_sum=False,
        server=Averaging(_NormWeighted),
        client=PlainClient(),
        trained=everything,
        uploaded=everything,
        downloaded=everything,
        takes_ranks=True,
    )


class _NormWeighted:
    """The mean of padded factors by size, and the plain weighted mean of all other tensors."""

    def __init__(self, adapter: NamedTensors) -> None:
        self._adapter = adapter
        self._layers = lora_layers(frozenset(adapter))
        self._others = WeightedMean(adapter)
        self._sums = {
            name: torch.zeros(adapter[name].shape, dtype=torch.float64)
            for layer in self._layers
            for name in (layer.zero, layer.random)
        }
        self._size = 0.0

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one site's update; it may be of a lower rank."""
        others = no_factors(frozenset(contribution.update), 1)
        self._others.accumulate(Contribution({n: contribution.update[n] for n in others}, contribution.weight))
        after = {name: trained_tensor(contribution, self._adapter, name) for name in self._sums}
        size = contribution.weight * math.hypot(*(product_norm(*layer.read(after)) for layer in self._layers))
        for name, tensor in after.items():
            corner(self._sums[name], tensor.shape).add_(tensor, alpha=size)
        self._size += size

    def result(self) -> NamedTensors:
        """Return what takes the adapter to the mean; nothing of the factors where every product is zero."""
        combined = dict(self._others.result())
        for name, total in self._sums.items():
            own = self._adapter[name]
            combined[name] = torch.zeros_like(own) if self._size == 0 else (total / self._size - own).float()
        return combined

    def metrics(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}
