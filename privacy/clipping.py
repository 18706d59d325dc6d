"""Bounding what one unit can do to a sum of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.linalg import vector_norm

__all__ = ["ClippedSum", "Fold", "clipped_sum", "sum_by_unit", "weighted_sum"]

_BLOCK = 1 << 18
"""Values that are computed with at once, in float64: 2 MiB."""
Fold = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows (units, n) float32, factors (units,) float64) to Σᵤ factorᵤ · rowᵤ of shape (n,), in the noise's own dtype."""


@dataclass(frozen=True)
class ClippedSum:
    """The sum of clipped per-unit gradients, one tensor per parameter, and two private facts about it."""

    sums: tuple[torch.Tensor, ...]
    clipped: int
    non_finite: int


def weighted_sum(rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return Σᵤ factorᵤ · rowᵤ in float64.

    In float32 the sum of n clipped rows would move by up to n² · 2^-24 of the clip norm with the order of its terms.
    """
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    at_once = _rows_at_once(rows)
    for some, theirs in zip(rows.split(at_once), factors.double().split(at_once), strict=True):
        total += torch.mv(some.double().T, theirs)
    return total


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """Return each row's L2 norm in float64: one that comes out too small lets more than the clip norm through."""
    return torch.cat([vector_norm(some, dim=1, dtype=torch.float64) for some in rows.split(_rows_at_once(rows))])


def _rows_at_once(rows: torch.Tensor) -> int:
    """Return how many rows are copied to float64 at a time: a head of many classes has wide ones, and all their copies
    together would leave the processor's cache."""
    return max(_BLOCK // max(rows.shape[1], 1), 1)


def clipped_sum(per_unit: Sequence[torch.Tensor], clip_norm: float, fold: Fold = weighted_sum) -> ClippedSum:
    """Return Σᵤ gᵤ · min(1, C/‖gᵤ‖), where gᵤ is unit u's gradient over *all* parameters together.

    Abadi et al. 2016 (arXiv 1607.00133), algorithm 1. Adding or removing one unit changes the result by at most
    `clip_norm` in L2 norm, to 1e-9 of it: norms, factors and sums are float64.

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
    =====================  ====================================================
    """
    flat = [gradient.reshape(len(gradient), math.prod(gradient.shape[1:])).float() for gradient in per_unit]
    norms = torch.stack([_norms(gradient) for gradient in flat]).norm(dim=0)
    finite = torch.isfinite(norms)
    factors = (clip_norm / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    factors = torch.where(finite, factors, torch.zeros_like(factors))
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
