"""What every codec offers, and the frame that its bytes travel in.

A message is one array of bytes: magic, version, the codec's tag, the number of values, then what the codec writes.
Names and shapes do not travel, because both ends know the layout: values are taken in the order of the names. Every
size follows from the layout and the codec's settings, and is compared before anything is allocated.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import torch

from protocol.errors import ReplyRejected
from protocol.tensors import Layout, NamedTensors

__all__ = [
    "ENCODED",
    "HEADER_BYTES",
    "Codec",
    "Encoded",
    "Section",
    "Sections",
    "WireContext",
    "checked_scales",
    "frame",
    "opened",
    "value_count",
]

ENCODED = "encoded"
"""Name of the one tensor that encoded tensors travel as."""

Encoded = Mapping[str, torch.Tensor]
"""What travels: uint8 bytes under `ENCODED`, or, without quantization, the tensors themselves."""

_HEADER = struct.Struct("<2sBBQ")
_MAGIC, _VERSION = b"CQ", 1
HEADER_BYTES = _HEADER.size
_LARGEST_SCALE = 1e33
"""Above what values of at most 1e30 can give."""


@dataclass(frozen=True)
class WireContext:
    """What a message is, in public: both ends derive the same rotation from it, and no two messages share one."""

    run: str
    round: int
    site: str
    direction: Literal["up", "down"]

    def seed(self, purpose: str, *, of_site: bool = True) -> bytes:
        """Return 32 bytes for one purpose; with `of_site=False` the same ones for all sites of the round."""
        site = f"{len(self.site)}|{self.site}" if of_site else "-"
        text = f"cloister codec|{purpose}|{self.direction}|{self.round}|{site}|{self.run}"
        return hashlib.sha256(text.encode()).digest()

    def rounding(self) -> torch.Generator:
        """Return the generator of stochastic rounding.

        It is public and has nothing to do with the stream of privacy noise: no promise rests on it, and a replayed
        round is encoded to the same bits.
        """
        return torch.Generator().manual_seed(int.from_bytes(self.seed("rounding")[:8], "little") >> 1)


class Codec(Protocol):
    """Encodes float32 tensors and decodes what it wrote. Stateless: all randomness comes in as arguments."""

    @property
    def is_summable(self) -> bool:
        """Whether sums of encodings decode to the sum, so that they can be added under encryption."""
        ...

    @property
    def is_unbiased(self) -> bool:
        """Whether decoded tensors are right on average, so that the error of a mean of n falls as 1/n."""
        ...

    @property
    def bits_per_value(self) -> float:
        """Nominal size of one value on the wire, for large adapters."""
        ...

    def norm_inflation(self, values: int) -> float:
        """Return a bound on decoded norm over encoded norm, for `values` values; holds up to 1e-5 of rounding."""
        ...

    def encode(self, tensors: NamedTensors, context: WireContext, generator: torch.Generator) -> Encoded:
        """Return what travels.

        Args:
            tensors: float32, at most 1e30 in size.
            context: public; the receiver decodes with an equal one.
            generator: of stochastic rounding.

        Raises:
            ValueError: a value is NaN, infinite or above 1e30.
        """
        ...

    def decode(self, encoded: Encoded, layout: Layout, context: WireContext) -> dict[str, torch.Tensor]:
        """Return float32 tensors of `layout`.

        The same bits on every machine that follows IEEE 754: nothing is summed in an order that a library chooses.

        Raises:
            ReplyRejected: code `malformed_payload` or `not_finite`; bytes that `encode` cannot have written.
        """
        ...


@dataclass(frozen=True)
class Section:
    """One array within a message."""

    count: int
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * np.dtype(self.dtype).itemsize


class Sections:
    """A message of known size as arrays over one buffer, in the order of the sections."""

    def __init__(self, sections: Sequence[Section], body: np.ndarray | None = None) -> None:
        """Lay sections over `body`, or over fresh zeros.

        Raises:
            ReplyRejected: code `malformed_payload`; the body has another size, and nothing has been allocated.
        """
        size = sum(section.size for section in sections)
        if body is not None and body.size != size:
            raise ReplyRejected(
                "malformed_payload", f"the payload has {body.size} bytes after its header, expected {size}"
            )
        self.body = np.zeros(size, dtype=np.uint8) if body is None else body
        ends = np.cumsum([0, *(section.size for section in sections)])
        self._parts = [self.body[start:stop] for start, stop in pairwise(ends.tolist())]
        self._dtypes = [section.dtype for section in sections]

    def read(self, position: int) -> np.ndarray:
        """Return a section's values: bytes as a view, numbers as a copy."""
        part, dtype = self._parts[position], self._dtypes[position]
        return part if dtype == "u1" else np.frombuffer(part.tobytes(), dtype=dtype)

    def write(self, position: int, values: np.ndarray) -> None:
        """Store a section's values."""
        self._parts[position][:] = np.ascontiguousarray(values, dtype=self._dtypes[position]).view(np.uint8)


def value_count(tensors: NamedTensors | Layout) -> int:
    """Return the number of values in tensors, or in a layout."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def frame(tag: int, values: int, body: np.ndarray) -> Encoded:
    """Return a body under its header, as what travels."""
    whole = np.empty(HEADER_BYTES + body.size, dtype=np.uint8)
    whole[:HEADER_BYTES] = np.frombuffer(_HEADER.pack(_MAGIC, _VERSION, tag, values), dtype=np.uint8)
    whole[HEADER_BYTES:] = body
    return {ENCODED: torch.from_numpy(whole)}


def opened(encoded: Encoded, tag: int, values: int) -> np.ndarray:
    """Return the body of what travelled, after comparing its header with the only one that it can have.

    Raises:
        ReplyRejected: code `malformed_payload`.
    """
    if list(encoded) != [ENCODED]:
        raise ReplyRejected("malformed_payload", f"expected one tensor {ENCODED!r}, got {len(encoded)} tensor(s)")
    tensor = encoded[ENCODED]
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() < HEADER_BYTES:
        raise ReplyRejected("malformed_payload", f"the payload is no row of at least {HEADER_BYTES} bytes")
    whole = tensor.contiguous().numpy()
    magic, version, given, count = _HEADER.unpack(whole[:HEADER_BYTES].tobytes())
    for name, found, wanted in (
        ("magic", magic, _MAGIC),
        ("version", version, _VERSION),
        ("codec", given, tag),
        ("count of values", count, values),
    ):
        if found != wanted:
            raise ReplyRejected("malformed_payload", f"the payload's {name} is {found!r}, expected {wanted!r}")
    return whole[HEADER_BYTES:]


def checked_scales(scales: np.ndarray) -> torch.Tensor:
    """Return the scales of a payload, float32.

    Raises:
        ReplyRejected: code `not_finite` for NaN and infinity, `malformed_payload` for what no update needs.
    """
    if not bool(np.isfinite(scales).all()):
        raise ReplyRejected("not_finite", "a scale of the payload is NaN or infinite")
    if scales.size and not (scales.min() >= 0 and scales.max() <= _LARGEST_SCALE):
        raise ReplyRejected("malformed_payload", f"a scale of the payload is not in [0, {_LARGEST_SCALE:g}]")
    return torch.from_numpy(scales.astype(np.float32))
