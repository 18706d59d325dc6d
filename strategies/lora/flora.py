"""FLoRA: stack all factors, fold them into the base, start anew (Wang et al., NeurIPS 2024, arXiv 2409.05976)."""

from __future__ import annotations

import torch

from protocol.tensors import NamedTensors
from strategies.averaging import everything
from strategies.base import Aggregator, Strategy
from strategies.lora.factors import is_zero_factor, no_factors
from strategies.lora.stacks import FoldingClient, FoldingServer, StackedMean, offset_tensors

__all__ = ["flora"]


def flora() -> Strategy:
    """Return W₀ ← W₀ + s Σ pₖ BₖAₖ, with B = 0 and A as drawn from the public seed at the start of every round.

    The stack [p₁B₁, …, p_K B_K] [A₁; …; A_K] (equation 3) is exact at any mix of ranks. It joins the offset that every
    site trains beside, so what comes down grows by the ranks of all sites in every round, up to min(m, n). The factors
    that were trained are given up each round, with what the optimizer found in them.
    """
    return Strategy(
        is_linear=False,
        sensitivity="unbounded",
        post_processes_sum=False,
        server=FoldingServer(_stacked),
        client=FoldingClient(),
        trained=everything,
        uploaded=everything,
        downloaded=no_factors,
        takes_ranks=True,
        initial=_with_zero_products,
    )


def _stacked(adapter: NamedTensors) -> Aggregator:
    return StackedMean(adapter, lambda layer, left, right: offset_tensors(layer.module, left, right))


def _with_zero_products(adapter: NamedTensors) -> NamedTensors:
    """Return the adapter with B = 0, as it is between all rounds."""
    return {name: torch.zeros_like(tensor) if is_zero_factor(name) else tensor for name, tensor in adapter.items()}
