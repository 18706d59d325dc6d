"""Tensors with many zeros as a bitmap and the values that are left: lossless, and about n/8 + 4k bytes for k of n.

The bitmap has a bit per entry, lowest bit first, in row-major order; the values follow as little-endian float32. An
array has one such form: -0.0, which is not all zero bits, counts as a value, so that what comes back is the same bits.
"""

from __future__ import annotations

import numpy as np

from protocol.errors import ReplyRejected

__all__ = ["packed", "unpacked"]


def packed(array: np.ndarray) -> bytes | None:
    """Return the bytes of a float32 array; None where they would not be fewer than its own."""
    flat = np.ascontiguousarray(array, dtype="<f4").reshape(-1)
    present = flat.view("<u4") != 0
    if _bitmap_bytes(flat.size) + 4 * int(np.count_nonzero(present)) >= flat.nbytes:
        return None
    return np.packbits(present, bitorder="little").tobytes() + flat[present].tobytes()


def unpacked(name: str, data: bytes, count: int) -> np.ndarray:
    """Return the `count` float32 values that bytes hold. The caller has bounded `count`.

    Raises:
        ReplyRejected: code `malformed_reply`; bytes that `packed` cannot have written.
    """
    size = _bitmap_bytes(count)
    if len(data) < size:
        raise ReplyRejected("malformed_reply", f"{name} declares {count} values; its bitmap has {len(data)} bytes")
    bitmap = np.frombuffer(data, dtype=np.uint8, count=size)
    if count % 8 and bitmap[-1] >> count % 8:
        raise ReplyRejected("malformed_reply", f"{name} declares {count} values; its bitmap has bits beyond them")
    present = np.unpackbits(bitmap, count=count, bitorder="little").view(np.bool_)
    kept = int(np.count_nonzero(present))
    if len(data) != size + 4 * kept:
        raise ReplyRejected(
            "malformed_reply", f"{name} declares {kept} values that are not zero in {len(data) - size} bytes"
        )
    values = np.frombuffer(data, dtype="<f4", offset=size)
    if not bool(values.view("<u4").all()):
        raise ReplyRejected("malformed_reply", f"{name} declares {kept} values that are not zero, and holds a zero")
    whole = np.zeros(count, dtype="<f4")
    whole[present] = values
    return whole


def _bitmap_bytes(count: int) -> int:
    return -(-count // 8)
