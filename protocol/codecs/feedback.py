"""Error feedback: what a codec left out is added to the next update (Karimireddy et al. 2019, arXiv 1901.09847)."""

from __future__ import annotations

from protocol.tensors import NamedTensors

__all__ = ["compensated", "residual"]


def compensated(update: NamedTensors, left_out: NamedTensors) -> NamedTensors:
    """Return Δ + e: what is to be encoded, clipped first where a norm is bounded (algorithm 2, line 5).

    Args:
        update: of this round.
        left_out: of the round before, as `residual` returned it; empty at first.
    """
    return {name: tensor + left_out[name] if name in left_out else tensor for name, tensor in update.items()}


def residual(encoded: NamedTensors, decoded: NamedTensors) -> NamedTensors:
    """Return e: what was to be encoded minus what the receiver decodes (algorithm 2, line 8)."""
    return {name: tensor - decoded[name] for name, tensor in encoded.items()}
