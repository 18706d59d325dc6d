"""What codecs that rotate have in common: normalized blocks, and the two scales of EDEN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from protocol.codecs.base import Section
from protocol.codecs.rotation import Chunk

__all__ = ["Scale", "inflation_limit", "normalized", "scale_section", "scales_of"]

Scale = Literal["unbiased", "min_mse"]

_SMALLEST = 1e-30
"""Its inverse is within float32."""
_MARGIN = 1.25
"""Above the inflation of Gaussian coordinates: a block with two equal spikes, the worst of them, needs 1.13."""


def scale_section(chunks: Sequence[Chunk]) -> Section:
    """Return the section of one float32 scale per block."""
    return Section(sum(chunk.blocks for chunk in chunks), "<f4")


def normalized(rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks scaled to a mean square of 1, in place, and their norms as float64; zeros below a norm of 1e-30."""
    norms = torch.linalg.vector_norm(rotated, dim=1, dtype=torch.float64)
    norms = torch.where(norms >= _SMALLEST, norms, 0)
    factors = math.sqrt(rotated.shape[1]) / norms.clamp_min(_SMALLEST)
    return rotated.mul_(torch.where(norms > 0, factors, 0).float()[:, None]), norms


def inflation_limit(kind: Scale, distortion: float) -> float:
    """Return the bound on decoded over encoded norm, which `scales_of` enforces.

    Gaussian coordinates give 1/√(1-D) for the unbiased scale; the least squares scale projects: never above 1.
    """
    return 1.0 if kind == "min_mse" else _MARGIN / math.sqrt(1 - distortion)


def scales_of(kind: Scale, limit: float, z: torch.Tensor, q: torch.Tensor, norms: torch.Tensor) -> np.ndarray:
    """Return what each block of q is multiplied with on decoding, float32.

    Unbiased: ‖x‖² / <Rx, q>, and at most `limit` ‖x‖ / ‖q‖. Least squares: <Rx, q> / ‖q‖² (Vargaftik et al. 2022, arXiv
    2108.08842, section 3).

    Args:
        kind: which of both.
        limit: as `inflation_limit` returns it.
        z: normalized blocks, shape (blocks, size).
        q: what they were rounded to.
        norms: of the blocks before they were normalized.
    """
    root = math.sqrt(z.shape[1])
    product = torch.linalg.vecdot(z, q).double()
    squares = torch.linalg.vecdot(q, q).double()
    if kind == "min_mse":
        scales = norms / root * product / squares
    else:
        scales = torch.minimum(norms * root / product.clamp_min(0), limit * norms / squares.sqrt())
    return torch.where((norms > 0) & (squares > 0), scales, 0).float().numpy()
