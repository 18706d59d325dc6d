"""Bounding what one record can do to a sum of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.linalg import vector_norm

__all__ = ["ClippedSum", "clipped_sum"]

_BLOCK = 4096


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

    =====================  ====================================================
    an example's gradient  what it adds
    =====================  ====================================================
    norm at most C         itself
    norm above C           itself, scaled to C
    zero                   zero
    NaN or infinite        zero
    entry above 1e19       zero, as if infinite: float32 cannot hold its square
    =====================  ====================================================
    """
    flat = [gradient.reshape(len(gradient), math.prod(gradient.shape[1:])).float() for gradient in per_example]
    norms = torch.stack([_row_norms(gradient) for gradient in flat]).norm(dim=0)
    finite = torch.isfinite(norms)
    factors = (clip_norm / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    # A factor that float32 could only hold as a subnormal would be rounded, possibly up: the example adds nothing then.
    usable = finite & (factors >= torch.finfo(torch.float32).tiny)
    factors = torch.where(usable, factors, torch.zeros_like(factors)).to(torch.float32)
    if not bool(finite.all()):
        # 0 * inf is NaN: the rows themselves must go, not only their factors.
        flat = [torch.where(finite[:, None], gradient, torch.zeros_like(gradient)) for gradient in flat]
    sums = tuple(
        torch.mv(gradient.T, factors).reshape(original.shape[1:])
        for gradient, original in zip(flat, per_example, strict=True)
    )
    return ClippedSum(sums, clipped=int(((norms > clip_norm) & finite).sum()), non_finite=int((~finite).sum()))


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the float64 L2 norm of each row.

    Summed in blocks: torch adds a long row's squares up in float32, which loses up to a percent of the norm at ten
    million entries (measured), and a norm that is too small lets more than `clip_norm` through.
    """
    count = rows.shape[1] // _BLOCK
    blocks = vector_norm(rows[:, : count * _BLOCK].unflatten(1, (count, _BLOCK)), dim=2)
    rest = vector_norm(rows[:, count * _BLOCK :], dim=1, keepdim=True)
    return torch.cat([blocks, rest], dim=1).double().norm(dim=1)
