"""A summable lattice: rotation, random rounding, integers modulo 2^b (Kairouz et al. 2021, arXiv 2102.06387)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from protocol.codecs.base import Encoded, Section, Sections, WireContext, frame, opened, value_count
from protocol.codecs.flat import FlatReader, FlatWriter
from protocol.codecs.packing import pack, packed_size, unpack
from protocol.codecs.rotation import rotate_whole, unrotate_whole
from protocol.tensors import Layout, NamedTensors

__all__ = ["Lattice"]

_DEVIATIONS = 5.0
"""Standard deviations of a coordinate that are represented; what is beyond is cut off, once in two million."""
_ATTEMPTS = 64

_TAG = 10


@dataclass(frozen=True)
class Lattice:
    """Integers k with γ k ≈ R x, all sites of a round using the same R and γ: sums modulo 2^b decode to the sum.

    An update is clipped to `norm_bound` c, rotated, and rounded at random to multiples of γ. Each integer is at most
    (2^(b-1) - 1) / `max_summands` in size, so a sum of that many never wraps around. Rounding is drawn again until the
    norm is at most √(c² + γ²d/4 + γ(c + γ√d/2)), which fails with a probability below e^(-1/2) each time (section 3,
    conditional rounding, β = e^(-1/2)): the sensitivity for noise added to the integers. The rotation does not pad.
    """

    bits: int
    norm_bound: float
    max_summands: int

    is_summable = True
    is_unbiased = True

    @property
    def bits_per_value(self) -> float:
        """Of the modulus."""
        return float(self.bits)

    @property
    def modulus(self) -> int:
        """2^b: residues are added modulo it."""
        return 1 << self.bits

    @property
    def largest(self) -> int:
        """The largest integer of one site."""
        return (self.modulus // 2 - 1) // self.max_summands

    def step(self, values: int) -> float:
        """Return γ: the largest integer stands for the largest coordinate, which rotation bounds."""
        # A coordinate's variance is below 2/d of the squared norm, for any input (`rotate_whole`).
        return self.norm_bound * min(1.0, _DEVIATIONS * math.sqrt(2 / max(values, 1))) / self.largest

    def norm_inflation(self, values: int) -> float:
        """Return the bound of conditional rounding over `norm_bound`; for updates of that norm."""
        bound, step = self.norm_bound, self.step(values)
        spread = step * math.sqrt(values)
        return math.sqrt(bound**2 + spread**2 / 4 + step * (bound + spread / 2)) / bound

    def residues(self, tensors: NamedTensors, context: WireContext, generator: torch.Generator) -> np.ndarray:
        """Return one site's integers modulo 2^b, uint16: ready to be masked, or to have integer noise added.

        Raises:
            ValueError: a value is NaN, infinite or above 1e30.
        """
        values = value_count(tensors)
        flat = FlatReader(tensors).read(values)
        norm, step = float(torch.linalg.vector_norm(flat, dtype=torch.float64)), self.step(values)
        # Scaled before it is rotated: squares of what an attacker sends may leave float32.
        flat.mul_(min(1.0, self.norm_bound / norm if norm > 0 else 1.0))
        rotated = rotate_whole(flat, context.seed("rotation", of_site=False)).div_(step)
        rotated.clamp_(-self.largest, self.largest)
        limit = self.norm_inflation(values) * self.norm_bound / step
        return (_rounded(rotated, limit, generator).numpy().astype(np.int32) & (self.modulus - 1)).astype(np.uint16)

    def total(self, residues: np.ndarray, layout: Layout, context: WireContext) -> dict[str, torch.Tensor]:
        """Return the sum of the updates whose residues were added modulo 2^b.

        Args:
            residues: shape (values,), any integer type; at most `max_summands` were added.
            layout: of the update.
            context: of the round.
        """
        centered = residues.astype(np.int32) & (self.modulus - 1)
        centered -= np.int32(self.modulus) * (centered >= self.modulus // 2)
        flat = torch.from_numpy(centered).float().mul_(self.step(residues.size))
        writer = FlatWriter(layout)
        writer.write(unrotate_whole(flat, context.seed("rotation", of_site=False)))
        return writer.tensors()

    def encode(self, tensors: NamedTensors, context: WireContext, generator: torch.Generator) -> Encoded:
        """Return packed residues; see `Codec.encode`."""
        values, residues = value_count(tensors), self.residues(tensors, context, generator)
        narrow = residues.astype(np.uint8) if self.bits <= 8 else residues  # what `pack` takes
        return frame(_TAG, values, pack(narrow, self.bits))

    def decode(self, encoded: Encoded, layout: Layout, context: WireContext) -> dict[str, torch.Tensor]:
        """Return the tensors; see `Codec.decode`."""
        values = value_count(layout)
        body = opened(encoded, _TAG, values)
        message = Sections([Section(packed_size(values, self.bits), "u1")], body)
        return self.total(unpack(message.read(0), values, self.bits), layout, context)


def _rounded(values: torch.Tensor, limit: float, generator: torch.Generator) -> torch.Tensor:
    """Return values rounded up or down at random, unbiased, with a norm of at most `limit`."""
    for _ in range(_ATTEMPTS):
        rounded = torch.rand(values.shape, generator=generator).add_(values).floor_()
        if float(torch.linalg.vector_norm(rounded, dtype=torch.float64)) <= limit:
            return rounded
    return values.trunc()  # never longer than what it was given
