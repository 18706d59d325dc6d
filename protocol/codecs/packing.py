"""Small integers side by side in bytes, eight at a time in one 64-bit word."""

from __future__ import annotations

import numpy as np

__all__ = ["pack", "packed_size", "unpack"]

_MASKS = (0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF)
"""Every other lane of 8, 16 and 32 bits."""


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` integers of `bits` bits take; they fill up to a multiple of eight integers."""
    return (count + 7) // 8 * bits


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return integers packed into bytes.

    Args:
        codes: uint8, or uint16 above 8 bits; one-dimensional, each below 2^bits.
        bits: 0 to 16.
    """
    if bits > 8:
        low, high = (codes & 0xFF).astype(np.uint8), (codes >> 8).astype(np.uint8)
        return np.concatenate([pack(low, 8), pack(high, bits - 8)])
    if codes.size % 8:
        codes = np.concatenate([codes, np.zeros(-codes.size % 8, dtype=np.uint8)])
    if bits == 8:
        return codes
    words = np.ascontiguousarray(codes).view("<u8")
    for step, mask in enumerate(_MASKS):
        words = (words & np.uint64(mask)) | ((words >> np.uint64(8 << step)) & np.uint64(mask)) << np.uint64(
            bits << step
        )
    return words.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)


def unpack(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Return the first `count` integers that `pack` was given: uint8, or uint16 above 8 bits.

    Args:
        packed: uint8, `packed_size(count, bits)` of them; any content.
        count: how many integers.
        bits: 0 to 16.
    """
    if bits > 8:
        split = packed_size(count, 8)
        low, high = unpack(packed[:split], count, 8), unpack(packed[split:], count, bits - 8)
        return low | high.astype(np.uint16) << 8
    if bits == 8:
        return packed[:count]
    wide = np.zeros((packed_size(count, 8) // 8, 8), dtype=np.uint8)
    wide[:, :bits] = packed.reshape(-1, bits) if bits else 0
    words = wide.view("<u8").reshape(-1)
    for step in (2, 1, 0):
        field = np.uint64((1 << (bits << step)) - 1)
        lanes = np.uint64(sum(int(field) << shift for shift in range(0, 64, 16 << step)))
        words = (words & lanes) | ((words >> np.uint64(bits << step)) & lanes) << np.uint64(8 << step)
    return words.astype("<u8", copy=False).view(np.uint8)[:count]
