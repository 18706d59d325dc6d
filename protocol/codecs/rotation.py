"""Randomized Hadamard rotations, as butterflies over whole rows.

H D / √n with the Walsh-Hadamard matrix H and random signs D (Ailon and Chazelle 2009) turns a vector into one whose
coordinates look Gaussian, unless it is sparse: of one or two spikes it makes few values, whatever the signs. A second
pass mends that. Additions and subtractions in a fixed order give the same bits on every machine, which a
matrix product would not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

__all__ = [
    "BLOCK_SIZES",
    "Chunk",
    "chunks_of",
    "hadamard",
    "rotate_blocks",
    "rotate_whole",
    "unrotate_blocks",
    "unrotate_whole",
]

BLOCK_SIZES = (16384, 4096, 1024, 256)
"""Sizes of blocks: as many as fit of each; only the last block is padded."""
_CHUNK_VALUES = 1 << 18
"""Values that are worked on at a time: a megabyte, which stays in the cache."""


@dataclass(frozen=True)
class Chunk:
    """Blocks of one size that are rotated together."""

    number: int
    blocks: int
    size: int

    @property
    def values(self) -> int:
        """Values, padding included."""
        return self.blocks * self.size


def chunks_of(values: int) -> Iterator[Chunk]:
    """Yield the chunks that cover `values` values in order; fewer than 256 are padding, at the end."""
    number, left = 0, values
    for size in BLOCK_SIZES:
        last = size == BLOCK_SIZES[-1]
        blocks = math.ceil(left / size) if last else left // size
        left -= blocks * size
        while blocks > 0:
            taken = min(blocks, max(_CHUNK_VALUES // size, 1))
            yield Chunk(number, taken, size)
            number, blocks = number + 1, blocks - taken


def hadamard(rows: torch.Tensor) -> torch.Tensor:
    """Return H of each row, not normalized: twice gives the row times its size. The input is overwritten.

    Args:
        rows: float32, shape (number, power of two), contiguous.
    """
    number, size = rows.shape
    low = 1 << (size.bit_length() // 2)
    high = size // low
    spare = torch.empty_like(rows)
    rows, spare = _levels(rows, spare, low, high)
    # Neighbors are far apart after a transposition: each butterfly then runs over long rows.
    spare.view(number, low, high).copy_(rows.view(number, high, low).transpose(1, 2))
    rows, spare = _levels(spare, rows, high, low)
    spare.view(number, high, low).copy_(rows.view(number, low, high).transpose(1, 2))
    return spare


def rotate_blocks(values: torch.Tensor, chunk: Chunk, seed: bytes) -> torch.Tensor:
    """Return the blocks rotated twice, shape (blocks, size); norms are kept. `values` is overwritten."""
    blocks = values.view(chunk.blocks, chunk.size)
    for signs in _two_passes(seed, chunk):
        blocks = hadamard(blocks.mul_(signs))
    return blocks.mul_(1 / chunk.size)


def unrotate_blocks(rotated: torch.Tensor, chunk: Chunk, seed: bytes) -> torch.Tensor:
    """Return what `rotate_blocks` was given. `rotated` is overwritten."""
    blocks = rotated
    for signs in reversed(_two_passes(seed, chunk)):
        blocks = hadamard(blocks).mul_(signs)
    return blocks.mul_(1 / chunk.size)


def rotate_whole(values: torch.Tensor, seed: bytes) -> torch.Tensor:
    """Return all of a row rotated together, whatever its size n: no padding. `values` is overwritten.

    Two rotations of the largest power of two m ≤ n, of the first and then of the last m coordinates. They overlap, as
    m > n/2, so every coordinate's variance is at most 1/m < 2/n of the squared norm, for any input.
    """
    for number, window in enumerate(_windows(values)):
        window *= _signs(seed, number, window.numel())
        window.copy_(hadamard(window.clone().view(1, -1)).view(-1).mul_(1 / math.sqrt(window.numel())))
    return values


def unrotate_whole(rotated: torch.Tensor, seed: bytes) -> torch.Tensor:
    """Return what `rotate_whole` was given. `rotated` is overwritten."""
    for number, window in reversed(list(enumerate(_windows(rotated)))):
        window.copy_(hadamard(window.clone().view(1, -1)).view(-1).mul_(1 / math.sqrt(window.numel())))
        window *= _signs(seed, number, window.numel())
    return rotated


def _two_passes(seed: bytes, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = _signs(seed, chunk.number, 2 * chunk.values).view(2, chunk.blocks, chunk.size)
    return first, second


def _levels(rows: torch.Tensor, spare: torch.Tensor, inner: int, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows after log2(factor) butterflies over distances from `inner` upwards, and the spare buffer."""
    distance = inner
    while distance < inner * factor:
        source, target = rows.view(-1, 2, distance), spare.view(-1, 2, distance)
        torch.add(source[:, 0], source[:, 1], out=target[:, 0])
        torch.sub(source[:, 0], source[:, 1], out=target[:, 1])
        rows, spare, distance = spare, rows, 2 * distance
    return rows, spare


def _windows(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if not values.numel():
        return ()
    size = 1 << (values.numel().bit_length() - 1)
    return values[:size], values[values.numel() - size :]


def _signs(seed: bytes, number: int, count: int) -> torch.Tensor:
    """Return `count` random signs, float32 (SHAKE-256 of seed and number: the same everywhere)."""
    bits = hashlib.shake_256(seed + number.to_bytes(8, "little")).digest((count + 7) // 8)
    ones = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=count)
    return torch.from_numpy(ones).to(torch.float32).mul_(-2).add_(1)
