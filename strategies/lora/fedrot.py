"""FedRot-LoRA: rotate the factors onto the received ones before averaging (ICML 2026, arXiv 2602.23638)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from protocol.tensors import NamedTensors, subtract
from strategies.averaging import Averaging, PlainClient, PlainRound, everything
from strategies.base import LocalOutcome, LocalRound, LocalStart, Strategy
from strategies.lora.drift import MeasuredMean
from strategies.lora.factors import lora_layers

__all__ = ["aligned", "fedrot"]


def fedrot() -> Strategy:
    """Return FedIT on aligned factors.

    BA = (BQ)(QᵀA) for every orthogonal Q, so sites drift apart by rotations that mean nothing, and averaging mixes them
    up. Each site takes that part out before it sends. The server adds up, as in FedIT, so sums under encryption and
    client-level clips work. Q is computed from released (noised) factors: under example-level privacy it is
    post-processing; under client-level privacy it comes before the clip.
    """
    return Strategy(
        is_linear=True,
        sensitivity="weighted_clip_norm",
        post_processes_sum=True,
        server=Averaging(MeasuredMean),
        client=Aligning(),
        trained=everything,
        uploaded=everything,
        downloaded=everything,
    )


class Aligning(PlainClient):
    """The client half that aligns its factors with those it received."""

    def begin(self, start: LocalStart) -> LocalRound:
        """Return a plain round with an aligned update."""
        return _AlignedRound(start)


@dataclass(frozen=True)
class _AlignedRound(PlainRound):
    def finish(self, after: NamedTensors) -> LocalOutcome:
        """Return aligned minus received."""
        turned = dict(after)
        for layer in lora_layers(frozenset(after)):
            turned |= layer.write(*aligned(layer.read(after), layer.read(self.start)))
        return LocalOutcome(subtract(turned, self.start, self.given.uploaded))


def aligned(
    factors: tuple[torch.Tensor, torch.Tensor], reference: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B Q and QᵀA with the orthogonal Q nearest to the reference (B₀, A₀).

    Q minimizes ‖BQ - B₀‖²/‖B₀‖² + ‖QᵀA - A₀‖²/‖A₀‖², the orthogonal Procrustes problem (Schönemann 1966): Q = U Vᵀ from
    the SVD of BᵀB₀/‖B₀‖² + AA₀ᵀ/‖A₀‖². The two terms weigh the same whatever the factors' scales; a zero reference
    (B before round 1) has no say.
    """
    (left, right), (left0, right0) = factors, reference
    match = torch.zeros(len(right), len(right), dtype=right.dtype)
    for overlap, anchor in ((left.T @ left0, left0), (right @ right0.T, right0)):
        size = float(anchor.square().sum())
        if size > 0:
            match += overlap / size
    u, _, vh = torch.linalg.svd(match)
    turn = u @ vh
    return left @ turn, turn.T @ right
