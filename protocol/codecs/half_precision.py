"""16-bit floating point: bfloat16, and IEEE half precision below a common power of two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from protocol.codecs.base import Encoded, Section, Sections, WireContext, frame, opened, value_count
from protocol.codecs.flat import LARGEST, FlatReader, FlatWriter
from protocol.errors import ReplyRejected
from protocol.tensors import Layout, NamedTensors

__all__ = ["HalfPrecision"]

_PIECE = 1 << 18
_ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""Largest relative error of rounding to the nearest: half a unit in the last place."""
_SUBNORMAL = 2.0**-25
"""Largest absolute error of IEEE half precision near zero (IEEE 754, binary16)."""

_TAGS = {"bf16": 1, "fp16": 2}


@dataclass(frozen=True)
class HalfPrecision:
    """Rounds each value to 16 bits, to the nearest.

    fp16 values are first divided by the power of two above the largest of them: none overflows, and none that matters
    underflows. bf16 has float32's range and needs no such scale.
    """

    kind: Literal["bf16", "fp16"]

    is_summable = False
    is_unbiased = False

    @property
    def bits_per_value(self) -> float:
        """Half of float32."""
        return 16.0

    def norm_inflation(self, values: int) -> float:
        """Return 1 plus the relative error of rounding, and for fp16 what is lost near zero."""
        return 1 + _ROUNDING[self.kind] + (2 * _SUBNORMAL * math.sqrt(values) if self.kind == "fp16" else 0)

    def encode(self, tensors: NamedTensors, context: WireContext, generator: torch.Generator) -> Encoded:
        """Return an exponent and 16 bits per value; see `Codec.encode`."""
        reader, values = FlatReader(tensors), value_count(tensors)
        exponent = self._exponent(tensors)
        message = Sections(_sections(values))
        message.write(0, np.array([exponent]))
        for start in range(0, values, _PIECE):
            piece = torch.ldexp(reader.read(min(_PIECE, values - start)), torch.tensor(-exponent)).to(self._dtype)
            message.body[4 + 2 * start : 4 + 2 * (start + piece.numel())] = piece.view(torch.uint8).numpy()
        return frame(_TAGS[self.kind], values, message.body)

    def decode(self, encoded: Encoded, layout: Layout, context: WireContext) -> dict[str, torch.Tensor]:
        """Return the tensors; see `Codec.decode`."""
        values = value_count(layout)
        message, writer = Sections(_sections(values), opened(encoded, _TAGS[self.kind], values)), FlatWriter(layout)
        (exponent,) = message.read(0).tolist()
        if not -149 <= exponent <= 100 or (self.kind == "bf16" and exponent):
            raise ReplyRejected("malformed_payload", f"the payload's exponent {exponent} is not one that is sent")
        codes = message.read(1)
        for start in range(0, values, _PIECE):
            raw = torch.from_numpy(codes[2 * start : 2 * (start + _PIECE)].copy()).view(self._dtype)
            piece = torch.ldexp(raw.float(), torch.tensor(exponent))
            if not bool((piece.abs() <= 2 * LARGEST).all()):
                raise ReplyRejected("not_finite", "the payload holds NaN, infinity or a value above 2e30")
            writer.write(piece)
        return writer.tensors()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.kind == "bf16" else torch.float16

    def _exponent(self, tensors: NamedTensors) -> int:
        """Return e with all values below 2^e; 0 for bf16."""
        if self.kind == "bf16":
            return 0
        largest = max((float(tensor.abs().max()) for tensor in tensors.values() if tensor.numel()), default=0.0)
        return math.frexp(largest)[1] if math.isfinite(largest) else 0


def _sections(values: int) -> list[Section]:
    return [Section(1, "<i4"), Section(2 * values, "u1")]
