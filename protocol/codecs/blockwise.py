"""int8 and int4: blocks scaled by their largest value, rounded at random (Dettmers et al. 2022, arXiv 2110.02861)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from protocol.codecs.base import Encoded, Section, Sections, WireContext, checked_scales, frame, opened, value_count
from protocol.codecs.flat import FlatReader, FlatWriter
from protocol.codecs.packing import pack, packed_size, unpack
from protocol.errors import ReplyRejected
from protocol.tensors import Layout, NamedTensors

__all__ = ["Blockwise", "block_pieces"]

_PIECE = 1 << 18

_TAGS = {8: 5, 4: 6}


@dataclass(frozen=True)
class Blockwise:
    """x → s/L · floor(x L/s + u), u uniform in [0, 1), s ≥ max |x| of the block, L = 127 or 7: the mean over u is x.

    Scales are bfloat16, rounded up, so that nothing is cut off. Blocks of the arrangement of Dettmers et al. (section
    2.1), the random rounding of QSGD (Alistarh et al. 2017, arXiv 1610.02132, section 3).
    """

    bits: Literal[4, 8]
    block_size: int

    is_summable = False
    is_unbiased = True

    @property
    def levels(self) -> int:
        """L: the largest integer."""
        return 2 ** (self.bits - 1) - 1

    @property
    def bits_per_value(self) -> float:
        """Codes, and a share of a 16-bit scale."""
        return self.bits + 16 / self.block_size

    def norm_inflation(self, values: int) -> float:
        """Return 1 + √block / L (1 + 2⁻⁷): each error is below a step, and the scale above the largest by 2⁻⁷."""
        return 1 + math.sqrt(self.block_size) / self.levels * (1 + 2.0**-7)

    def encode(self, tensors: NamedTensors, context: WireContext, generator: torch.Generator) -> Encoded:
        """Return scales and codes; see `Codec.encode`."""
        reader, values = FlatReader(tensors), value_count(tensors)
        message, code_part = Sections(self._sections(values)), self._code_slices(values)
        scales = list[np.ndarray]()
        for size, part in code_part:
            blocks = reader.read(size).view(-1, self.block_size)
            raw = _rounded_up(blocks.abs().amax(dim=1))
            scale = _as_float(raw)
            scales.append(raw)
            factors = torch.where(scale > 0, self.levels / scale, 0)
            codes = blocks.mul_(factors[:, None]).add_(torch.rand(blocks.shape, generator=generator)).floor_()
            codes = codes.clamp_(-self.levels, self.levels).add_(self.levels).to(torch.uint8)
            message.body[part] = pack(codes.reshape(-1).numpy(), self.bits)
        if scales:
            message.write(0, np.concatenate(scales))
        return frame(_TAGS[self.bits], values, message.body)

    def decode(self, encoded: Encoded, layout: Layout, context: WireContext) -> dict[str, torch.Tensor]:
        """Return the tensors; see `Codec.decode`."""
        values = value_count(layout)
        message, writer = (
            Sections(self._sections(values), opened(encoded, _TAGS[self.bits], values)),
            FlatWriter(layout),
        )
        scales, block = checked_scales(_as_float(message.read(0)).numpy()) / self.levels, 0
        for size, part in self._code_slices(values):
            codes = unpack(message.body[part], size, self.bits)
            if codes.max(initial=0) > 2 * self.levels:
                raise ReplyRejected("malformed_payload", f"the payload has a code above {2 * self.levels}")
            blocks = torch.from_numpy(codes.copy()).float().sub_(self.levels).view(-1, self.block_size)
            writer.write(blocks.mul_(scales[block : block + blocks.shape[0], None]))
            block += blocks.shape[0]
        return writer.tensors()

    def _sections(self, values: int) -> list[Section]:
        blocks = math.ceil(values / self.block_size)
        return [Section(blocks, "<u2"), Section(packed_size(blocks * self.block_size, self.bits), "u1")]

    def _code_slices(self, values: int) -> list[tuple[int, slice]]:
        """Return, for each piece, its values and where its codes are in the body."""
        start, pieces = 2 * math.ceil(values / self.block_size), list[tuple[int, slice]]()
        for size in block_pieces(values, self.block_size):
            length = packed_size(size, self.bits)
            pieces.append((size, slice(start, start + length)))
            start += length
        return pieces


def block_pieces(values: int, block_size: int) -> list[int]:
    """Return the sizes, whole blocks each, of the pieces that are worked on at a time."""
    whole = math.ceil(values / block_size) * block_size
    piece = _PIECE // block_size * block_size
    return [min(piece, whole - start) for start in range(0, whole, piece)]


def _rounded_up(positive: torch.Tensor) -> np.ndarray:
    """Return the bits of the next bfloat16 values upwards, uint16."""
    bits = positive.numpy().view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)


def _as_float(raw: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((raw.astype(np.uint32) << np.uint32(16)).view(np.float32))
