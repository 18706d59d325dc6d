"""EDEN: rotate, round to Lloyd-Max's codebook, scale exactly (Vargaftik et al., ICML 2022, arXiv 2108.08842)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from protocol.codecs.base import Encoded, Section, Sections, WireContext, checked_scales, frame, opened, value_count
from protocol.codecs.flat import FlatReader, FlatWriter
from protocol.codecs.gaussian import centroids, distortion, nearest
from protocol.codecs.packing import pack, packed_size, unpack
from protocol.codecs.rotated import Rotated, normalized, scale_section, scales_of
from protocol.codecs.rotation import Chunk, chunks_of, rotate_blocks, unrotate_blocks
from protocol.tensors import Layout, NamedTensors

__all__ = ["Eden"]

_TAG = 3


@dataclass(frozen=True)
class Eden(Rotated):
    """Decodes to S R⁻¹ Q(R x) per block, R a random rotation and Q the codebook of N(0, 1) (algorithm 1).

    With S = ‖x‖² / <Rx, Q> the mean over rotations is x, and the relative squared error D/(1-D) for the codebook's
    distortion D, whatever x is: 0.571, 0.133, 0.0358, 0.00959 at 1 to 4 bits. With S = <Rx, Q> / ‖Q‖² it is D, biased.
    A fraction of a bit is a random share of coordinates that get one bit more (section 4.2); below one bit the rest
    gets nothing, which is random sparsification (section 4.1).
    """

    @property
    def distortion(self) -> float:
        """D, averaged over coordinates."""
        low, share = int(self.bits), self.bits - int(self.bits)
        return (1 - share) * distortion(low) + (share * distortion(low + 1) if share else 0)

    def encode(self, tensors: NamedTensors, context: WireContext, generator: torch.Generator) -> Encoded:
        """Return scales and codes; see `Codec.encode`."""
        reader, seed = FlatReader(tensors), context.seed("rotation")
        chunks = list(chunks_of(reader.left))
        message, scales = Sections(self._sections(chunks)), list[np.ndarray]()
        for position, chunk in enumerate(chunks):
            z, norms = normalized(self._ordered(rotate_blocks(reader.read(chunk.values), chunk, seed), seed))
            q, more = torch.empty_like(z), self._more(chunk.size)
            for part, (columns, bits) in enumerate(((slice(more), self._high), (slice(more, None), self._low))):
                codes = nearest(z[:, columns], bits)
                q[:, columns] = _looked_up(codes, bits)
                message.write(1 + 2 * position + part, pack(codes.reshape(-1), bits))
            scales.append(scales_of(self.scale, self.norm_inflation(chunk.values), z, q, norms))
        if chunks:
            message.write(0, np.concatenate(scales))
        return frame(_TAG, value_count(tensors), message.body)

    def decode(self, encoded: Encoded, layout: Layout, context: WireContext) -> dict[str, torch.Tensor]:
        """Return the tensors; see `Codec.decode`."""
        values, seed = value_count(layout), context.seed("rotation")
        chunks = list(chunks_of(values))
        message = Sections(self._sections(chunks), opened(encoded, _TAG, values))
        scales, writer, block = checked_scales(message.read(0)), FlatWriter(layout), 0
        for position, chunk in enumerate(chunks):
            q, more = torch.empty(chunk.blocks, chunk.size), self._more(chunk.size)
            for part, (columns, bits) in enumerate(((slice(more), self._high), (slice(more, None), self._low))):
                shape = q[:, columns].shape
                codes = unpack(message.read(1 + 2 * position + part), shape.numel(), bits)
                q[:, columns] = _looked_up(codes.reshape(shape), bits)
            q *= scales[block : block + chunk.blocks, None]
            writer.write(unrotate_blocks(self._unordered(q, seed), chunk, seed))
            block += chunk.blocks
        return writer.tensors()

    @property
    def _low(self) -> int:
        return int(self.bits)

    @property
    def _high(self) -> int:
        return math.ceil(self.bits)

    def _more(self, size: int) -> int:
        """Return how many coordinates of a block get the larger number of bits; whole groups of eight pack evenly."""
        return round((self.bits - self._low) * size / 8) * 8

    def _sections(self, chunks: Sequence[Chunk]) -> list[Section]:
        sections = [scale_section(chunks)]
        for chunk in chunks:
            more = chunk.blocks * self._more(chunk.size)
            sections.append(Section(packed_size(more, self._high), "u1"))
            sections.append(Section(packed_size(chunk.values - more, self._low), "u1"))
        return sections

    def _ordered(self, rotated: torch.Tensor, seed: bytes) -> torch.Tensor:
        """Return the coordinates in a random order, which decides about their bits, where that matters."""
        return rotated if self._low == self._high else rotated[:, _order(seed, rotated.shape[1])]

    def _unordered(self, values: torch.Tensor, seed: bytes) -> torch.Tensor:
        if self._low == self._high:
            return values
        back = torch.empty_like(values)
        back[:, _order(seed, values.shape[1])] = values
        return back


def _order(seed: bytes, size: int) -> torch.Tensor:
    """Return a random permutation (of 64-bit keys of SHAKE-256, sorted: the same everywhere)."""
    keys = np.frombuffer(hashlib.shake_256(seed + b"order").digest(8 * size), dtype="<u8")
    return torch.from_numpy(np.argsort(keys, kind="stable"))


def _looked_up(codes: np.ndarray, bits: int) -> torch.Tensor:
    return torch.from_numpy(np.take(centroids(bits), codes))
