"""Named tensors: what an adapter and an update are made of, and how a receiver checks them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from protocol.errors import ReplyRejected

__all__ = [
    "LARGEST_VALUE",
    "Layout",
    "NamedTensors",
    "TensorShape",
    "add",
    "byte_count",
    "check_values",
    "corner",
    "digest",
    "layout_of",
    "subtract",
    "verify",
]

LARGEST_VALUE = 1e9
"""In size, of an adapter and of an update."""

NamedTensors = Mapping[str, torch.Tensor]
"""Float32 CPU tensors by PEFT state-dict name."""


@dataclass(frozen=True)
class TensorShape:
    """What a receiver expects of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


Layout = Mapping[str, TensorShape]


def layout_of(tensors: NamedTensors) -> Layout:
    """Return the shape and dtype of each tensor."""
    return {name: TensorShape(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def digest(tensors: NamedTensors) -> str:
    """Return the SHA-256 (hex) of names, shapes, dtypes and values, independent of the mapping's order."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        # The length keeps a name from spelling out another tensor.
        state.update(f"{len(name)}|{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        state.update(tensor.numpy().tobytes())
    return state.hexdigest()


def byte_count(tensors: NamedTensors) -> int:
    """Return the bytes that the values take, without names or framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def corner(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the view of `shape` at the beginning of every dimension: a factor cut to a lower rank."""
    return tensor[tuple(slice(size) for size in shape)]


def subtract(after: NamedTensors, before: NamedTensors, names: frozenset[str]) -> dict[str, torch.Tensor]:
    """Return `after - before` for `names`: the update a site sends."""
    return {name: after[name] - before[name] for name in sorted(names)}


def add(adapter: NamedTensors, update: NamedTensors) -> dict[str, torch.Tensor]:
    """Return `adapter` with `update` added where it has a tensor; the rest is passed on unchanged."""
    return {name: tensor + update[name] if name in update else tensor for name, tensor in adapter.items()}


def verify(tensors: NamedTensors, expected: Layout) -> None:
    """Check tensors from the network against what was asked for.

    Raises:
        ReplyRejected: with code `missing_tensor`, `unknown_tensor`, `wrong_dtype`, `wrong_shape` or `not_finite`, and
            a message that names the tensor.
    """
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise ReplyRejected("missing_tensor", f"{len(missing)} tensor(s) are missing, first {missing[0]}")
    if unknown:
        raise ReplyRejected("unknown_tensor", f"{len(unknown)} tensor(s) were not asked for, first {unknown[0]}")
    for name, wanted in expected.items():
        tensor = tensors[name]
        if tensor.dtype != wanted.dtype:
            raise ReplyRejected("wrong_dtype", f"{name} has dtype {tensor.dtype}, expected {wanted.dtype}")
        if tuple(tensor.shape) != wanted.shape:
            raise ReplyRejected("wrong_shape", f"{name} has shape {tuple(tensor.shape)}, expected {wanted.shape}")
        check_values(name, tensor)


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Check that every value is one that training can give: finite, and at most `LARGEST_VALUE` in size.

    A larger one is no update: its products and squares leave float32, and one site would end the run for all.

    Raises:
        ReplyRejected: with code `not_finite`.
    """
    # The comparison is false for NaN.
    if not bool((tensor.abs() <= LARGEST_VALUE).all()):
        raise ReplyRejected("not_finite", f"{name} holds NaN or infinity, or a value above {LARGEST_VALUE:g} in size")
