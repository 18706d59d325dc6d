"""Inner products between updates: of the factors, and of the change of each product BA beside them.

What a model computes is the product, Dₖ = (B+dBₖ)(A+dAₖ) - BA = dBₖ (A+dAₖ) + B dAₖ, and what a rule averages are the
factors. Many pairs of factors have one product, (BQ)(Q⁻¹A) = BA, so neither is enough: an attacker that sends an honest
product in factors of any size would pass a judge of products, and ruin the mean of the factors. Both count, as one
vector: ‖xₖ - xⱼ‖² = ‖Dₖ - Dⱼ‖² + ‖dBₖ - dBⱼ‖² + ‖dAₖ - dAⱼ‖², which bounds each part. With
Lₖ = [dBₖ, B] and Rₖ = [A+dAₖ; dAₖ] that is Dₖ = Lₖ Rₖ, and ⟨Dₖ, Dⱼ⟩ = Σ (Lₖᵀ Lⱼ) ∘ (Rₖ Rⱼᵀ): two 2r x 2r matrices,
never a dense product. Tensors that are no factor (a head, a magnitude) enter with their plain inner product. LoRA's
scale s is left out: it is the same for every layer, so that only layers against heads are weighed differently by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from protocol.tensors import NamedTensors

__all__ = ["gram"]

_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
"""The right factor (r x n) and the left one (m x r)."""


@dataclass(frozen=True)
class _Pair:
    right: str
    left: str


def gram(updates: Sequence[NamedTensors], starts: Sequence[NamedTensors], *, products: bool) -> torch.Tensor:
    """Return the inner products of updates, (K, K) float64.

    Args:
        updates: one per site, of the same names and shapes.
        starts: the whole adapter that each started from.
        products: add the inner products of the changes of BA to those of the factors; False: the factors alone.
    """
    names = sorted(updates[0])
    pairs = _pairs(starts[0]) if products else ()
    moved = [pair for pair in pairs if pair.left in updates[0] or pair.right in updates[0]]
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in names:
        flat = torch.stack([update[name].flatten() for update in updates]).double()
        total += flat @ flat.T
    for pair in moved:
        total += _of_pair(pair, updates, starts)
    return total


def _of_pair(pair: _Pair, updates: Sequence[NamedTensors], starts: Sequence[NamedTensors]) -> torch.Tensor:
    lefts: list[torch.Tensor] = []
    rights: list[torch.Tensor] = []
    for update, start in zip(updates, starts, strict=True):
        right, left = start[pair.right].double(), start[pair.left].double()
        moved_right = update[pair.right].double() if pair.right in update else torch.zeros_like(right)
        moved_left = update[pair.left].double() if pair.left in update else torch.zeros_like(left)
        lefts.append(torch.cat([moved_left, left], dim=1))
        rights.append(torch.cat([right + moved_right, moved_right], dim=0))
    left, right = torch.stack(lefts), torch.stack(rights)
    lefts_together = torch.einsum("kmr,jms->kjrs", left, left)
    rights_together = torch.einsum("krn,jsn->kjrs", right, right)
    return (lefts_together * rights_together).sum(dim=(2, 3))


def _pairs(start: NamedTensors) -> tuple[_Pair, ...]:
    """Return the factor pairs among an adapter's tensors: those of two dimensions that a product exists of."""
    found: list[_Pair] = []
    for name in start:
        parts = name.split(".")
        for right, left in _PAIRS:
            if right not in parts:
                continue
            partner = ".".join(left if part == right else part for part in parts)
            if partner in start and _multiply(start[partner], start[name]):
                found.append(_Pair(name, partner))
    return tuple(found)


def _multiply(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0]
