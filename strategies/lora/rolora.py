"""RoLoRA: train B in one round and A in the next (Chen et al., NeurIPS 2025, arXiv 2502.01755, algorithm 1)."""

from __future__ import annotations

from strategies.averaging import Averaging, PlainClient, everything
from strategies.base import Names, Strategy
from strategies.lora.factors import without_random_factors, without_zero_factors

__all__ = ["rolora"]


def rolora() -> Strategy:
    """Return B ← B + Σ pₖ ΔBₖ in odd rounds and A ← A + Σ pₖ ΔAₖ in even ones.

    One factor is common to all sites in every round, so the mean is exact, Σ pₖ BₖA = B̄A, and half the bytes go up. B
    comes first, because it starts at zero. Both factors come down: a site that missed a round needs the one that moved
    in it. Tensors that are no LoRA factor are trained in every round.
    """
    return Strategy(
        is_linear=True,
        sensitivity="weighted_clip_norm",
        post_processes_sum=True,
        server=Averaging(),
        client=PlainClient(),
        trained=_turn,
        uploaded=_turn,
        downloaded=everything,
    )


def _turn(names: Names, round_number: int) -> Names:
    chosen = without_random_factors if round_number % 2 else without_zero_factors
    return chosen(names, round_number)
