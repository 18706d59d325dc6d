"""NF4: QLoRA's sixteen levels (Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E). For comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from protocol.codecs.base import Encoded, Section, Sections, WireContext, checked_scales, frame, opened, value_count
from protocol.codecs.blockwise import block_pieces
from protocol.codecs.flat import FlatReader, FlatWriter
from protocol.codecs.packing import pack, unpack
from protocol.tensors import Layout, NamedTensors

__all__ = ["NF4"]

_LEVELS = torch.tensor(
    [
        float(level)
        for level in ["-1", "-0.6961928", "-0.5250731", "-0.3949175", "-0.2844414", "-0.1847734", "-0.09105", "0"]
    ]
    + [
        float(level)
        for level in ["0.0795803", "0.1609302", "0.2461123", "0.3379152", "0.4407098", "0.562617", "0.7229568", "1"]
    ]
)
"""Quantiles of N(0, 1), scaled to [-1, 1], with an exact zero (appendix E)."""
_WORST = 0.1519036
"""Half the widest gap between two levels."""

_TAG = 7


@dataclass(frozen=True)
class NF4:
    """Rounds x / max |x| of its block to the nearest level. Biased: errors of sites do not average out."""

    block_size: int

    is_summable = False
    is_unbiased = False

    @property
    def bits_per_value(self) -> float:
        """Codes, and a share of a float32 scale."""
        return 4 + 32 / self.block_size

    def norm_inflation(self, values: int) -> float:
        """Return 1 + 0.152 √block: each error is at most half the widest gap, times the largest value."""
        return 1 + _WORST * math.sqrt(self.block_size)

    def encode(self, tensors: NamedTensors, context: WireContext, generator: torch.Generator) -> Encoded:
        """Return scales and codes; see `Codec.encode`."""
        reader, values = FlatReader(tensors), value_count(tensors)
        message, scales, codes = Sections(self._sections(values)), list[np.ndarray](), 4 * self._blocks(values)
        for size in block_pieces(values, self.block_size):
            blocks = reader.read(size).view(-1, self.block_size)
            scale = blocks.abs().amax(dim=1)
            scales.append(scale.numpy())
            blocks.mul_(torch.where(scale > 0, 1 / scale, 0)[:, None])
            nearest = torch.bucketize(blocks, (_LEVELS[1:] + _LEVELS[:-1]) / 2, out_int32=True)
            message.body[codes : codes + size // 2] = pack(nearest.to(torch.uint8).reshape(-1).numpy(), 4)
            codes += size // 2
        if scales:
            message.write(0, np.concatenate(scales))
        return frame(_TAG, values, message.body)

    def decode(self, encoded: Encoded, layout: Layout, context: WireContext) -> dict[str, torch.Tensor]:
        """Return the tensors; see `Codec.decode`."""
        values = value_count(layout)
        message, writer = Sections(self._sections(values), opened(encoded, _TAG, values)), FlatWriter(layout)
        scales, codes, block, start = checked_scales(message.read(0)), message.read(1), 0, 0
        for size in block_pieces(values, self.block_size):
            found = np.take(_LEVELS.numpy(), unpack(codes[start : start + size // 2], size, 4))
            blocks = torch.from_numpy(found).view(-1, self.block_size)
            writer.write(blocks.mul_(scales[block : block + blocks.shape[0], None]))
            block, start = block + blocks.shape[0], start + size // 2
        return writer.tensors()

    def _blocks(self, values: int) -> int:
        return math.ceil(values / self.block_size)

    def _sections(self, values: int) -> list[Section]:
        blocks = self._blocks(values)
        return [Section(blocks, "<f4"), Section(blocks * self.block_size // 2, "u1")]
