"""FFA-LoRA: freeze A, train and average B (Sun et al., ICLR 2024, arXiv 2403.12313, section 4)."""

from __future__ import annotations

from strategies.averaging import Averaging, PlainClient
from strategies.base import Strategy
from strategies.lora.factors import without_random_factors

__all__ = ["ffa_lora"]


def ffa_lora() -> Strategy:
    """Return B ← B + Σ pₖ ΔBₖ, with A as drawn from the public seed.

    With one common A the mean is exact, Σ pₖ BₖA = B̄A; the noise enters linearly; and half the bytes travel, because
    every site derives A itself. A site of rank rₖ trains the first rₖ columns of B. Tensors that are no LoRA factor (a
    classification head) are trained and averaged too.
    """
    return Strategy(
        is_linear=True,
        sensitivity="weighted_clip_norm",
        post_processes_sum=True,
        server=Averaging(),
        client=PlainClient(),
        trained=without_random_factors,
        uploaded=without_random_factors,
        downloaded=without_random_factors,
        takes_ranks=True,
    )
