"""What codecs that rotate have in common: a rate, normalized blocks, and the two scales of EDEN."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from protocol.codecs.base import Section
from protocol.codecs.rotation import Chunk

__all__ = ["Rotated", "Scale", "normalized", "scale_section", "scales_of"]

Scale = Literal["unbiased", "min_mse"]

_SMALLEST = 1e-30
"""Its inverse is within float32."""
_MARGIN = 1.25
"""Above the inflation of Gaussian coordinates: a block with two equal spikes, the worst of them, needs 1.13."""


@dataclass(frozen=True)
class Rotated(ABC):
    """A codec of `bits` per value whose error depends on its rate alone, whatever the update is."""

    bits: float
    scale: Scale = "unbiased"

    is_summable = False

    @property
    @abstractmethod
    def distortion(self) -> float:
        """D: the mean squared error of a coordinate of variance 1 that is rounded."""

    @property
    def is_unbiased(self) -> bool:
        """Whether the unbiased scale is used."""
        return self.scale == "unbiased"

    @property
    def bits_per_value(self) -> float:
        """The rate."""
        return self.bits

    def norm_inflation(self, values: int) -> float:
        """Return the bound that `scales_of` enforces: 1.25/√(1-D) for the unbiased scale, 1 for the other.

        Gaussian coordinates give 1/√(1-D) with the unbiased scale; the least squares scale projects: never above 1.
        """
        return 1.0 if self.scale == "min_mse" else _MARGIN / math.sqrt(1 - self.distortion)


def scale_section(chunks: Sequence[Chunk]) -> Section:
    """Return the section of one float32 scale per block."""
    return Section(sum(chunk.blocks for chunk in chunks), "<f4")


def normalized(rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks scaled to a mean square of 1, in place, and their norms as float64; zeros below a norm of 1e-30."""
    norms = torch.linalg.vector_norm(rotated, dim=1, dtype=torch.float64)
    norms = torch.where(norms >= _SMALLEST, norms, 0)
    factors = math.sqrt(rotated.shape[1]) / norms.clamp_min(_SMALLEST)
    return rotated.mul_(torch.where(norms > 0, factors, 0).float()[:, None]), norms


def scales_of(kind: Scale, limit: float, z: torch.Tensor, q: torch.Tensor, norms: torch.Tensor) -> np.ndarray:
    """Return what each block of q is multiplied with on decoding, float32.

    Unbiased: ‖x‖² / <Rx, q>, and at most `limit` ‖x‖ / ‖q‖. Least squares: <Rx, q> / ‖q‖² (Vargaftik et al. 2022, arXiv
    2108.08842, section 3).

    Args:
        kind: which of both.
        limit: on decoded over encoded norm (`Rotated.norm_inflation`).
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
