"""Scaled signs: signSGD (Bernstein et al. 2018, arXiv 1802.04434) with the scale of EF-SignSGD (arXiv 1901.09847)."""

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

__all__ = ["SignSGD"]

_BLOCK = 1024

_TAG = 8


@dataclass(frozen=True)
class SignSGD:
    """Decodes to (‖x‖₁ / n) sign(x) in blocks of n = 1024 (Karimireddy et al. 2019, algorithm 1). Biased.

    The scale is the one of least squares, so the norm never grows: (‖x‖₁/n) √n ≤ ‖x‖₂.
    """

    is_summable = False
    is_unbiased = False

    @property
    def bits_per_value(self) -> float:
        """A sign, and a share of a float32 scale."""
        return 1 + 32 / _BLOCK

    def norm_inflation(self, values: int) -> float:
        """Return 1."""
        return 1.0

    def encode(self, tensors: NamedTensors, context: WireContext, generator: torch.Generator) -> Encoded:
        """Return scales and signs; see `Codec.encode`."""
        reader, values = FlatReader(tensors), value_count(tensors)
        message, scales, start = Sections(_sections(values)), list[np.ndarray](), 4 * math.ceil(values / _BLOCK)
        for size in block_pieces(values, _BLOCK):
            # The last block is padded; its mean is over the values that exist.
            counts = torch.full((size // _BLOCK,), float(_BLOCK))
            if reader.left < size:
                counts[-1] = reader.left - (size - _BLOCK)
            blocks = reader.read(size).view(-1, _BLOCK)
            scales.append((blocks.abs().sum(dim=1, dtype=torch.float64) / counts).float().numpy())
            message.body[start : start + size // 8] = pack((blocks < 0).view(torch.uint8).reshape(-1).numpy(), 1)
            start += size // 8
        if scales:
            message.write(0, np.concatenate(scales))
        return frame(_TAG, values, message.body)

    def decode(self, encoded: Encoded, layout: Layout, context: WireContext) -> dict[str, torch.Tensor]:
        """Return the tensors; see `Codec.decode`."""
        values = value_count(layout)
        message, writer = Sections(_sections(values), opened(encoded, _TAG, values)), FlatWriter(layout)
        scales, signs, block, start = checked_scales(message.read(0)), message.read(1), 0, 0
        for size in block_pieces(values, _BLOCK):
            negative = torch.from_numpy(unpack(signs[start : start + size // 8], size, 1).copy())
            blocks = negative.float().mul_(-2).add_(1).view(-1, _BLOCK)
            writer.write(blocks.mul_(scales[block : block + blocks.shape[0], None]))
            block, start = block + blocks.shape[0], start + size // 8
        return writer.tensors()


def _sections(values: int) -> list[Section]:
    blocks = math.ceil(values / _BLOCK)
    return [Section(blocks, "<f4"), Section(blocks * _BLOCK // 8, "u1")]
