"""Bounding what one unit can do to a sum of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.linalg import vector_norm

__all__ = ["ClippedSum", "Fold", "clipped_sum", "sum_by_unit", "weighted_sum"]

_BLOCK = 4096

Fold = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows (units, n), factors (units,)) to Σᵤ factorᵤ · rowᵤ of shape (n,), in the dtype of what it is added to."""


@dataclass(frozen=True)
class ClippedSum:
    """The sum of clipped per-unit gradients, one tensor per parameter, and two private facts about it."""

    sums: tuple[torch.Tensor, ...]
    clipped: int
    non_finite: int


def weighted_sum(rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return Σᵤ factorᵤ · rowᵤ in float32."""
    return torch.mv(rows.T, factors)


def clipped_sum(per_unit: Sequence[torch.Tensor], clip_norm: float, fold: Fold = weighted_sum) -> ClippedSum:
    """Return Σᵤ gᵤ · min(1, C/‖gᵤ‖), where gᵤ is unit u's gradient over *all* parameters together.

    Abadi et al. 2016 (arXiv 1607.00133), algorithm 1. Adding or removing one unit changes the result by at most
    `clip_norm` in L2 norm.

    Args:
        per_unit: one tensor per parameter, each of shape (units, *parameter shape).
        clip_norm: C; `inf` leaves every finite gradient as it is.
        fold: how the rows of one parameter are summed; the noise's own, so that the sum has the form it is noised in.

    =====================  ====================================================
    a unit's gradient      what it adds
    =====================  ====================================================
    norm at most C         itself
    norm above C           itself, scaled to C
    zero                   zero
    NaN or infinite        zero
    entry above 1e19       zero, as if infinite: float32 cannot hold its square
    =====================  ====================================================
    """
    flat = [gradient.reshape(len(gradient), math.prod(gradient.shape[1:])).float() for gradient in per_unit]
    norms = torch.stack([_row_norms(gradient) for gradient in flat]).norm(dim=0)
    finite = torch.isfinite(norms)
    factors = (clip_norm / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    # A factor that float32 could only hold as a subnormal would be rounded, possibly up: the unit adds nothing then.
    usable = finite & (factors >= torch.finfo(torch.float32).tiny)
    factors = torch.where(usable, factors, torch.zeros_like(factors)).to(torch.float32)
    non_finite = int((~finite).sum())
    if non_finite:
        # 0 * inf is NaN: the rows themselves must go, not only their factors.
        flat = [torch.where(finite[:, None], gradient, torch.zeros_like(gradient)) for gradient in flat]
    sums = tuple(
        fold(gradient, factors).reshape(original.shape[1:]) for gradient, original in zip(flat, per_unit, strict=True)
    )
    return ClippedSum(sums, clipped=int(((norms > clip_norm) & finite).sum()), non_finite=non_finite)


def sum_by_unit(per_example: Sequence[torch.Tensor], owners: torch.Tensor) -> list[torch.Tensor]:
    """Return the per-unit sums of per-example values: float32 tensors of shape (units, ...).

    Args:
        per_example: tensors of shape (examples, ...).
        owners: int64, shape (examples,): the unit of each example, 0 to units - 1; -1 for a padding row, left out.
    """
    real = owners >= 0
    kept = int(real.sum())
    if torch.equal(owners[:kept], torch.arange(kept, device=owners.device)):
        # Each example is a unit of its own, padding comes last: views, not copies.
        return [values[:kept].float() for values in per_example]
    units = int(owners.max()) + 1
    sums = [torch.zeros(units, *values.shape[1:], dtype=torch.float32, device=values.device) for values in per_example]
    for total, values in zip(sums, per_example, strict=True):
        total.index_add_(0, owners[real], values[real].float())
    return sums


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the float64 L2 norm of each row.

    Summed in blocks: torch adds a long row's squares up in float32, which loses up to a percent of the norm at ten
    million entries (measured), and a norm that is too small lets more than `clip_norm` through.
    """
    if rows.shape[1] <= _BLOCK:
        return vector_norm(rows, dim=1).double()
    count = rows.shape[1] // _BLOCK
    blocks = vector_norm(rows[:, : count * _BLOCK].unflatten(1, (count, _BLOCK)), dim=2)
    rest = vector_norm(rows[:, count * _BLOCK :], dim=1, keepdim=True)
    return torch.cat([blocks, rest], dim=1).double().norm(dim=1)
