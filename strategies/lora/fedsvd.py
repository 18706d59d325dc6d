"""FedSVD: train B, and let the server turn the basis A (Lee et al., NeurIPS 2025, arXiv 2505.12805, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.tensors import NamedTensors, add
from strategies.averaging import Averaging, PlainClient, everything
from strategies.base import ServerState, Strategy
from strategies.lora.factors import lora_layers, without_random_factors
from strategies.lora.spectral import spectral

__all__ = ["fedsvd"]


def fedsvd() -> Strategy:
    """Return B ← B + Σ pₖ ΔBₖ, then A ← Vᵀ and B ← U S from the SVD of B̄A.

    With one common A the mean is exact, Σ pₖ BₖA = B̄A, and the step leaves that product as it is. A has orthonormal
    rows, also in round 1, so ‖∂ℓ/∂B‖ is at most ‖∂ℓ/∂z‖·‖x‖: clipping cuts less. Only B is noised; the SVD sees the
    combined update alone and is post-processing. A site of rank rₖ gets the best rank-rₖ part of the product.
    """
    return Strategy(
        is_linear=True,
        sensitivity="weighted_clip_norm",
        post_processes_sum=True,
        server=_TurnedBasis(),
        client=PlainClient(),
        trained=without_random_factors,
        uploaded=without_random_factors,
        downloaded=everything,
        takes_ranks=True,
        initial=_turned,
    )


@dataclass(frozen=True)
class _TurnedBasis(Averaging):
    def step(
        self, adapter: NamedTensors, combined: NamedTensors, state: ServerState
    ) -> tuple[NamedTensors, ServerState]:
        """Return the moved adapter, its products factored anew."""
        return _turned(add(adapter, combined)), state


def _turned(adapter: NamedTensors) -> NamedTensors:
    turned = dict(adapter)
    for layer in lora_layers(frozenset(adapter)):
        turned |= layer.write(*spectral(*layer.read(adapter)))
    return turned
