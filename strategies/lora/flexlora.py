"""FlexLoRA: the best rank-r approximation of the mean product (Bai et al., NeurIPS 2024, arXiv 2402.11505)."""

from __future__ import annotations

import torch

from protocol.tensors import NamedTensors, subtract
from strategies.averaging import Averaging, PlainClient, everything
from strategies.base import Aggregator, Strategy
from strategies.lora.factors import LoraLayer
from strategies.lora.spectral import truncated
from strategies.lora.stacks import StackedMean

__all__ = ["flexlora"]


def flexlora() -> Strategy:
    """Return B ← U_r S_r and A ← V_rᵀ from the SVD of Σ pₖ BₖAₖ (section 3.2).

    No rank-r adapter is nearer to the mean product (Eckart and Young 1936). The SVD is taken from QR decompositions of
    the stacked factors, O((m + n)(K r)²), never from an m x n matrix. A site of rank rₖ gets the first rₖ components.
    """
    return Strategy(
        is_linear=False,
        sensitivity="unbounded",
        post_processes_sum=False,
        server=Averaging(_best),
        client=PlainClient(),
        trained=everything,
        uploaded=everything,
        downloaded=everything,
        takes_ranks=True,
    )


def _best(adapter: NamedTensors) -> Aggregator:
    def finish(layer: LoraLayer, left: torch.Tensor, right: torch.Tensor) -> NamedTensors:
        own = adapter[layer.random].shape
        rank = own[1] if layer.transposed else own[0]
        left, right = truncated(left, right, rank)
        # Fewer components than the rank: the rest keeps a right factor that training can start from.
        left = torch.cat([left, left.new_zeros(len(left), rank - len(right))], dim=1)
        right = torch.cat([right, layer.read(adapter)[1][len(right) :]])
        best = layer.write(left, right)
        return subtract(best, adapter, frozenset(best))

    return StackedMean(adapter, finish)
