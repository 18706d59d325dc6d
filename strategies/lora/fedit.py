"""FedIT: train and average both LoRA factors (Zhang et al., ICASSP 2024, arXiv 2305.05644, section 3)."""

from __future__ import annotations

from strategies.averaging import Averaging, PlainClient, everything
from strategies.base import Strategy
from strategies.lora.drift import MeasuredMean

__all__ = ["fedit"]


def fedit() -> Strategy:
    """Return A ← A + Σ pₖ ΔAₖ and B ← B + Σ pₖ ΔBₖ.

    The product of the means is not the mean of the products: the server's B̄Ā misses Σ pₖ (Bₖ-B̄)(Aₖ-Ā), whose size is
    logged in every round (`drift.py`). Under example-level privacy both factors are noised and their noises multiply;
    `ffa_lora` and `fedsvd` have neither problem.
    """
    return Strategy(
        is_linear=True,
        sensitivity="weighted_clip_norm",
        post_processes_sum=True,
        server=Averaging(MeasuredMean),
        client=PlainClient(),
        trained=everything,
        uploaded=everything,
        downloaded=everything,
    )
