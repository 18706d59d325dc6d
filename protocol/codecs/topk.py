"""Top-k sparsification (Stich et al. 2018, arXiv 1809.07599, definition 2.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from protocol.codecs.base import Encoded, Section, Sections, WireContext, frame, opened, value_count
from protocol.codecs.flat import LARGEST, FlatReader, FlatWriter
from protocol.errors import ReplyRejected
from protocol.tensors import Layout, NamedTensors

__all__ = ["TopK"]

_WINDOW = 1 << 16
"""Positions are 16 bits within windows of this many values."""

_TAG = 9


@dataclass(frozen=True)
class TopK:
    """Sends the k = ⌈fraction · n⌉ values largest in size exactly, and zeros for the rest. Biased.

    Finding them takes a copy of all values. With error feedback (`feedback.py`) what was left out comes later.
    """

    fraction: float

    is_summable = False
    is_unbiased = False

    @property
    def bits_per_value(self) -> float:
        """A 16-bit position and a float32 for each value that is sent."""
        return 48 * self.fraction

    def norm_inflation(self, values: int) -> float:
        """Return 1."""
        return 1.0

    def encode(self, tensors: NamedTensors, context: WireContext, generator: torch.Generator) -> Encoded:
        """Return counts per window, positions and values; see `Codec.encode`."""
        values = value_count(tensors)
        flat = FlatReader(tensors).read(values)
        kept = torch.topk(flat.abs(), self._kept(values), sorted=False).indices.sort().values
        message = Sections(self._sections(values))
        positions = kept.numpy()
        message.write(0, np.bincount(positions // _WINDOW, minlength=_windows(values)))
        message.write(1, positions % _WINDOW)
        message.write(2, flat[kept].numpy())
        return frame(_TAG, values, message.body)

    def decode(self, encoded: Encoded, layout: Layout, context: WireContext) -> dict[str, torch.Tensor]:
        """Return the tensors; see `Codec.decode`."""
        values = value_count(layout)
        message, writer = Sections(self._sections(values), opened(encoded, _TAG, values)), FlatWriter(layout)
        counts, kept = message.read(0).astype(np.int64), message.read(2)
        if counts.sum() != self._kept(values):
            raise ReplyRejected("malformed_payload", f"the payload counts {counts.sum()} values, not {kept.size}")
        positions = np.repeat(np.arange(counts.size) * _WINDOW, counts) + message.read(1)
        if positions.size and (positions[-1] >= values or not bool((np.diff(positions) > 0).all())):
            raise ReplyRejected("malformed_payload", "the payload's positions do not ascend within the layout")
        if not bool((np.abs(kept) <= LARGEST).all()):
            raise ReplyRejected("not_finite", f"the payload holds NaN, infinity or a value above {LARGEST:g}")
        flat = torch.zeros(values)
        flat[torch.from_numpy(positions)] = torch.from_numpy(kept.copy())
        writer.write(flat)
        return writer.tensors()

    def _kept(self, values: int) -> int:
        return math.ceil(self.fraction * values)

    def _sections(self, values: int) -> list[Section]:
        kept = self._kept(values)
        return [Section(_windows(values), "<u4"), Section(kept, "<u2"), Section(kept, "<f4")]


def _windows(values: int) -> int:
    return math.ceil(values / _WINDOW)
