"""No codec: tensors travel as named float32 arrays."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from protocol.codecs.base import Encoded, WireContext
from protocol.tensors import Layout, NamedTensors, verify

__all__ = ["NoCodec"]


@dataclass(frozen=True)
class NoCodec:
    """Passes tensors on. NaN and infinity are found by the receiver."""

    is_summable = False
    is_unbiased = True

    @property
    def bits_per_value(self) -> float:
        """Float32."""
        return 32.0

    def norm_inflation(self, values: int) -> float:
        """Return 1."""
        return 1.0

    def encode(self, tensors: NamedTensors, context: WireContext, generator: torch.Generator) -> Encoded:
        """Return the tensors."""
        return tensors

    def decode(self, encoded: Encoded, layout: Layout, context: WireContext) -> dict[str, torch.Tensor]:
        """Return the tensors, checked against the layout.

        Raises:
            ReplyRejected: as `protocol.tensors.verify` does.
        """
        verify(encoded, layout)
        return dict(encoded)
