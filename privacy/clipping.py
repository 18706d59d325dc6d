"""Bounding what one record can do to a sum of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["ClippedSum", "clipped_sum"]


@dataclass(frozen=True)
class ClippedSum:
    """The sum of clipped per-example gradients, one tensor per parameter, and two private facts about it."""

    sums: tuple[torch.Tensor, ...]
    clipped: int
    non_finite: int


def clipped_sum(per_example: Sequence[torch.Tensor], clip_norm: float) -> ClippedSum:
    """Return Σᵢ gᵢ · min(1, C/‖gᵢ‖), where gᵢ is example i's gradient over *all* parameters together.

    Abadi et al. 2016 (arXiv 1607.00133), algorithm 1. Adding or removing one example changes the result by at most
    `clip_norm` in L2 norm.

    Args:
        per_example: one tensor per parameter, each of shape (examples, *parameter shape).
        clip_norm: C; `inf` leaves every finite gradient as it is.

    =====================  ==================
    an example's gradient  what it adds
    =====================  ==================
    norm at most C         itself
    norm above C           itself, scaled to C
    zero                   zero
    NaN or infinite        zero
    =====================  ==================
    """
    flat = [gradient.reshape(gradient.shape[0], -1).to(torch.float32) for gradient in per_example]
    # A norm of norms: squares of large but finite gradients must not overflow into "infinite".
    norms = torch.stack([torch.linalg.vector_norm(gradient, dim=1) for gradient in flat]).double().norm(dim=0)
    finite = torch.isfinite(norms)
    factors = (clip_norm / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    factors = torch.where(finite, factors, torch.zeros_like(factors)).to(torch.float32)
    if not bool(finite.all()):
        # 0 * inf is NaN: the rows themselves must go, not only their factors.
        flat = [torch.where(finite[:, None], gradient, torch.zeros_like(gradient)) for gradient in flat]
    sums = tuple(
        torch.mv(gradient.T, factors).reshape(original.shape[1:])
        for gradient, original in zip(flat, per_example, strict=True)
    )
    return ClippedSum(sums, clipped=int((norms > clip_norm).sum()), non_finite=int((~finite).sum()))
