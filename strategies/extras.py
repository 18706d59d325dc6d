"""Tensors under a prefix: what a strategy sends or keeps beside the adapter, told apart from everybody else's."""

from __future__ import annotations

import torch

from protocol.errors import ReplyRejected
from protocol.tensors import NamedTensors, check_values

__all__ = ["prefixed", "verify_copies", "without_prefix"]


def prefixed(prefix: str, tensors: NamedTensors) -> dict[str, torch.Tensor]:
    """Return tensors with the prefix before each name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: NamedTensors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the tensors that have the prefix, their names without it, and the others as they are."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return own, {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def verify_copies(copies: NamedTensors, adapter: NamedTensors, meaning: str) -> None:
    """Check tensors that stand for one of the adapter each.

    Raises:
        ReplyRejected: an unknown name, another shape or dtype, or a value that is not finite.
    """
    for name, tensor in copies.items():
        if name not in adapter:
            raise ReplyRejected("unknown_tensor", f"{meaning} of {name!r}, which is no tensor of this adapter")
        wanted = adapter[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ReplyRejected(
                "wrong_shape",
                f"{meaning} of {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {wanted.dtype} "
                f"{tuple(wanted.shape)}",
            )
        check_values(f"{meaning} of {name}", tensor)
