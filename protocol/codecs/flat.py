"""Named tensors as one row of values, read and written a piece at a time, so that no copy of the whole is needed."""

from __future__ import annotations

import math

import torch

from protocol.codecs.base import value_count
from protocol.errors import ReplyRejected
from protocol.tensors import Layout, NamedTensors

__all__ = ["LARGEST", "FlatReader", "FlatWriter"]

LARGEST = 1e30
"""Sums and squares of 2^14 values below it stay within float32's and float64's range."""
_SMALLEST = 2.0**-116
"""What is smaller is sent as zero: scales of subnormal numbers have few digits, and inverses beyond float32."""


class FlatReader:
    """Hands out the values of tensors, in the order of the names."""

    def __init__(self, tensors: NamedTensors) -> None:
        self._rows = [tensors[name].detach().reshape(-1) for name in sorted(tensors)]
        self._row, self._offset = 0, 0
        self.left = value_count(tensors)

    def read(self, count: int) -> torch.Tensor:
        """Return the next values, float32; `count` of them, zeros where the tensors end before. A copy.

        Values below 2⁻¹¹⁶ in size are read as zero.

        Raises:
            ValueError: a value is NaN, infinite or above `LARGEST`.
        """
        values, filled = torch.zeros(count), 0
        while filled < count and self._row < len(self._rows):
            row = self._rows[self._row]
            piece = row[self._offset : self._offset + count - filled]
            values[filled : filled + piece.numel()] = piece
            filled += piece.numel()
            self._offset += piece.numel()
            if self._offset == row.numel():
                self._row, self._offset = self._row + 1, 0
        self.left -= filled
        # Written so that NaN fails it.
        if count and not (float(values.max()) <= LARGEST and float(values.min()) >= -LARGEST):
            raise ValueError(f"cannot encode values that are not finite, or above {LARGEST:g} in size")
        return torch.nn.functional.hardshrink(values, _SMALLEST)


class FlatWriter:
    """Takes values in the order of the names, and gives the tensors of a layout."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._values = torch.empty(value_count(layout))
        self._filled = 0

    def write(self, values: torch.Tensor) -> None:
        """Take the next values; what goes beyond the layout is padding, and dropped.

        Raises:
            ReplyRejected: code `not_finite`. Scales and codes that are fine one by one can be made to meet in one
                coordinate of a rotated block, whose sum leaves float32: rotations are public.
        """
        room = self._values[self._filled : self._filled + values.numel()]
        room.copy_(values.reshape(-1)[: room.numel()])
        if not bool(torch.isfinite(room).all()):
            raise ReplyRejected("not_finite", "the payload decodes to NaN, or to values beyond float32")
        self._filled += room.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors, views of one row."""
        names = sorted(self._layout)
        pieces = self._values.split([math.prod(self._layout[name].shape) for name in names])
        shaped = {name: piece.reshape(self._layout[name].shape) for name, piece in zip(names, pieces, strict=True)}
        return {name: shaped[name] for name in self._layout}
