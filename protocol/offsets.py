"""What was folded into the base, by name: a frozen ΔW = s·left·right beside each LoRA layer's own two factors.

Rules that stack or correct products leave more than rank r behind. It is kept in factors, left (m x k) and right
(k x n), travels beside the adapter's own tensors, and is never trained. For an embedding m is the vocabulary.
"""

from __future__ import annotations

import torch

from protocol.errors import ReplyRejected
from protocol.tensors import NamedTensors, check_values

__all__ = ["is_offset", "modules_with_offsets", "offset_names", "verify_offset"]

_LEFT, _RIGHT = "lora_offset_left", "lora_offset_right"


def offset_names(module: str) -> tuple[str, str]:
    """Return the names of the two factors that belong to a module (by its PEFT state-dict prefix)."""
    return f"{module}.{_LEFT}", f"{module}.{_RIGHT}"


def is_offset(name: str) -> bool:
    """Return whether a tensor is a factor of an offset."""
    return name.endswith((_LEFT, _RIGHT))


def modules_with_offsets(tensors: NamedTensors) -> tuple[str, ...]:
    """Return the modules that have an offset among `tensors`, sorted."""
    return tuple(sorted({name.rpartition(".")[0] for name in tensors if is_offset(name)}))


def verify_offset(tensors: NamedTensors, module: str, rows: int, columns: int) -> None:
    """Check one module's offset, of shapes (rows x k) and (k x columns).

    Raises:
        ReplyRejected: with code `missing_tensor`, `wrong_dtype`, `wrong_shape` or `not_finite`.
    """
    names = offset_names(module)
    for name in names:
        if name not in tensors:
            raise ReplyRejected("missing_tensor", f"{name} is missing; both factors of an offset travel together")
        if tensors[name].dtype != torch.float32:
            raise ReplyRejected("wrong_dtype", f"{name} has dtype {tensors[name].dtype}, expected torch.float32")
    left, right = (tensors[name] for name in names)
    inner = right.shape[0] if right.dim() == 2 else -1
    if tuple(left.shape) != (rows, inner) or tuple(right.shape) != (inner, columns) or inner > min(rows, columns):
        raise ReplyRejected(
            "wrong_shape",
            f"the offset of {module} has shapes {tuple(left.shape)} and {tuple(right.shape)}, expected ({rows}, k) and "
            f"(k, {columns}) with k at most {min(rows, columns)}",
        )
    for name in names:
        check_values(name, tensors[name])
