"""Rotation, uniform lattice, entropy coding: a quarter of a bit per value from the limit, at any rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import constriction
import numpy as np
import torch

from protocol.codecs.base import Encoded, WireContext, checked_scales, frame, opened, value_count
from protocol.codecs.flat import FlatReader, FlatWriter
from protocol.codecs.gaussian import normal_cdf
from protocol.codecs.rotated import Rotated, normalized, scales_of
from protocol.codecs.rotation import chunks_of, rotate_blocks, unrotate_blocks
from protocol.errors import ReplyRejected
from protocol.tensors import Layout, NamedTensors

__all__ = ["UniformEntropy", "step_of_rate"]

_stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue] - a compiled module, untyped

_TAIL = 7.0
"""Coordinates beyond it are rounded to it; a Gaussian one is there once in 10^11, and the scale makes up for it."""
_PRECISION = 1 << 22
_WORD = "<u4"

_TAG = 4


@dataclass(frozen=True)
class UniformEntropy(Rotated):
    """Decodes to S R⁻¹ Δ round(R x / Δ) per block; the integers are coded with their exact Gaussian probabilities.

    The rate is the integers' entropy. Entropy-coded scalar quantization of a Gaussian is 0.2546 bit from the
    rate-distortion function at high rates (Gish and Pierce 1968), where Lloyd-Max's fixed rate loses up to 0.72. The
    scales are EDEN's. The coder is asymmetric numeral systems (Duda 2013, arXiv 1311.2540) of the library constriction.
    """

    @property
    def step(self) -> float:
        """Δ, in units of a coordinate's standard deviation."""
        return step_of_rate(self.bits)

    @property
    def distortion(self) -> float:
        """D of rounding to multiples of Δ."""
        return _distortion(self.step)

    def encode(self, tensors: NamedTensors, context: WireContext, generator: torch.Generator) -> Encoded:
        """Return, for each chunk, a length, scales and coded integers; see `Codec.encode`."""
        reader, seed, step = FlatReader(tensors), context.seed("rotation"), self.step
        model, edge = _model(step), _edge(step)
        parts: list[np.ndarray] = []
        for chunk in chunks_of(reader.left):
            z, norms = normalized(rotate_blocks(reader.read(chunk.values), chunk, seed))
            integers = torch.round(z / step).clamp_(-edge, edge)
            scales = scales_of(self.scale, self.norm_inflation(chunk.values), z, integers, norms)
            coder = _stream.stack.AnsCoder()
            coder.encode_reverse((integers + edge).to(torch.int32).reshape(-1).numpy(), model)
            words = coder.get_compressed()
            parts += [np.array([words.size], dtype=_WORD), scales.astype("<f4"), words.astype(_WORD)]
        body = np.concatenate([part.view(np.uint8) for part in parts]) if parts else np.zeros(0, dtype=np.uint8)
        return frame(_TAG, value_count(tensors), body)

    def decode(self, encoded: Encoded, layout: Layout, context: WireContext) -> dict[str, torch.Tensor]:
        """Return the tensors; see `Codec.decode`."""
        values, seed, step = value_count(layout), context.seed("rotation"), self.step
        model, edge, body = _model(step), _edge(step), _Body(opened(encoded, _TAG, values))
        chunks = list(chunks_of(values))
        # A length, the scales and one word of each: whoever sends less costs no memory.
        body.need(sum(8 + 4 * chunk.blocks for chunk in chunks))
        writer = FlatWriter(layout)
        for chunk in chunks:
            (size,) = body.take(1, _WORD).tolist()
            scales = checked_scales(body.take(chunk.blocks, "<f4"))
            integers = _decoded(body.take(size, _WORD), model, chunk.values)
            q = torch.from_numpy(integers).float().sub_(edge).view(chunk.blocks, chunk.size).mul_(scales[:, None])
            writer.write(unrotate_blocks(q, chunk, seed))
        body.finish()
        return writer.tensors()


class _Body:
    """A payload of unknown size, read from the front."""

    def __init__(self, body: np.ndarray) -> None:
        self._left = body

    def need(self, size: int) -> None:
        if size > self._left.size:
            raise ReplyRejected("malformed_payload", f"the payload ends {size - self._left.size} bytes too early")

    def take(self, count: int, dtype: str) -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        self.need(size)
        taken, self._left = self._left[:size], self._left[size:]
        return np.frombuffer(taken.tobytes(), dtype=dtype)

    def finish(self) -> None:
        if self._left.size:
            raise ReplyRejected("malformed_payload", f"the payload has {self._left.size} bytes more than it needs")


@cache
def step_of_rate(bits: float) -> float:
    """Return Δ at which round(z / Δ), z ~ N(0, 1), has an entropy of `bits` bits, by bisection."""
    low, high = 1e-3, 8.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _entropy(middle) > bits else (low, middle)
    # Few digits, so that both ends have the same step although their libraries may differ in the last bit.
    return float(f"{low:.6g}")


@lru_cache(maxsize=8)
def _model(step: float) -> Any:
    """Return the probabilities of the integers -edge to edge, from decimal arithmetic: the same at both ends."""
    edge, exact = _edge(step), Decimal(repr(step))
    upper = [normal_cdf((Decimal(integer) + Decimal("0.5")) * exact) for integer in range(edge)]
    cells = [
        2 * (upper[0] - Decimal("0.5")),
        *(after - before for before, after in pairwise(upper)),
    ]
    cells.append(1 - upper[-1])
    half = [int(cell * _PRECISION) + 1 for cell in cells]
    # Whole numbers, exact as float32: what the library makes of them does not depend on the machine.
    return _stream.model.Categorical(np.array(half[:0:-1] + half, dtype=np.float32), perfect=False)


def _edge(step: float) -> int:
    return math.ceil(_TAIL / step)


def _cells(step: float) -> np.ndarray:
    """Return the probabilities of the integers -edge to edge, as floats."""
    cdf = [0.5 * math.erfc(-(k + 0.5) * step / math.sqrt(2)) for k in range(-_edge(step) - 1, _edge(step) + 1)]
    return np.clip(np.diff(cdf), 1e-300, None)


def _entropy(step: float) -> float:
    cells = _cells(step)
    return float(-(cells * np.log2(cells)).sum())


@cache
def _distortion(step: float) -> float:
    """Return the least squares distortion 1 - E[z q]² / E[q²]; E[z q] is a sum of densities at the cells' edges."""
    edge = _edge(step)
    integers = np.arange(-edge, edge + 1)
    edges = (np.arange(-edge - 1, edge + 1) + 0.5) * step
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    return float(1 - (integers * -np.diff(density)).sum() ** 2 / (integers**2 * _cells(step)).sum())


def _decoded(words: np.ndarray, model: Any, count: int) -> np.ndarray:
    if not words.size or words[-1] == 0:
        raise ReplyRejected("malformed_payload", "a coded part of the payload is empty, or ends in a zero word")
    coder = _stream.stack.AnsCoder(words.astype(np.uint32))
    integers = coder.decode(model, count)
    if not coder.is_empty():
        raise ReplyRejected("malformed_payload", "a coded part of the payload does not end where its values end")
    return integers
