"""The two factors of LoRA by name, ΔW = s·B A, and what every factor-aware rule does with them.

A layer's factors are read as `left` (m x r), which starts at zero, and `right` (r x n), which is drawn at random. For a
linear layer these are B and A. For an embedding PEFT has them swapped, so they are Aᵀ and Bᵀ; the algebra is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from protocol.tensors import Layout, NamedTensors, TensorShape
from strategies.base import Names

__all__ = [
    "RANDOM_FACTORS",
    "LoraLayer",
    "cut",
    "is_random_factor",
    "is_zero_factor",
    "lora_layers",
    "no_factors",
    "whole_layout",
    "without_random_factors",
    "without_zero_factors",
]

RANDOM_FACTORS = ("lora_A", "lora_embedding_B")
"""The factor drawn at random; the other one starts at zero. PEFT's embedding has them swapped."""
_ZERO_FACTORS = {"lora_B": "lora_A", "lora_embedding_A": "lora_embedding_B"}


@dataclass(frozen=True)
class LoraLayer:
    """The tensor names of one adapted layer."""

    module: str
    zero: str
    """Of the factor that starts at zero."""
    random: str
    transposed: bool

    def read(self, tensors: NamedTensors, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        """Return left (m x r) and right (r x n)."""
        left, right = tensors[self.zero].to(dtype), tensors[self.random].to(dtype)
        return (left.T, right.T) if self.transposed else (left, right)

    def write(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the two factors as named float32 tensors."""
        if self.transposed:
            left, right = left.T, right.T
        return {self.zero: left.float().contiguous(), self.random: right.float().contiguous()}


def lora_layers(names: Names) -> tuple[LoraLayer, ...]:
    """Return every layer of which both factors are among `names`, in the order of their names."""
    found: list[LoraLayer] = []
    for name in sorted(names):
        parts = name.split(".")
        for position, part in enumerate(parts):
            other = ".".join([*parts[:position], _ZERO_FACTORS.get(part, ""), *parts[position + 1 :]])
            if part in _ZERO_FACTORS and other in names:
                found.append(LoraLayer(".".join(parts[:position]), name, other, part == "lora_embedding_A"))
    return tuple(found)


def cut(tensors: NamedTensors, rank: int | None) -> dict[str, torch.Tensor]:
    """Return the tensors with each factor cut to its first `rank` components; None, or more than there are: all."""
    cuts: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if rank is not None and "lora_core" in parts:
            heads, width, _ = tensor.shape
            # One core is cut to its leading block; of several the first are kept.
            tensor = tensor[:, :rank, :rank] if heads == 1 else tensor[: rank // width]
        elif rank is not None and "lora_core_scale" in parts and len(tensor) > 1:
            tensor = tensor[: rank * len(tensor) // _rank_of(name, tensors)]
        elif rank is not None and ("lora_A" in parts or "lora_embedding_A" in parts):
            tensor = tensor[:rank]
        elif rank is not None and ("lora_B" in parts or "lora_embedding_B" in parts):
            tensor = tensor[:, :rank]
        cuts[name] = tensor.contiguous()
    return cuts


def whole_layout(layout: Layout, rank: int, cores: int) -> Layout:
    """Return the layout that `cut` made `layout` of: factors of `rank`, or `cores` square cores that add up to it."""

    def whole(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        parts = name.split(".")
        if "lora_core" in parts:
            return (cores, rank // cores, rank // cores)
        if "lora_A" in parts or "lora_embedding_A" in parts:
            return (rank, *shape[1:])
        return (shape[0], rank) if "lora_B" in parts or "lora_embedding_B" in parts else shape

    return {name: TensorShape(whole(name, each.shape), each.dtype) for name, each in layout.items()}


def _rank_of(scale: str, tensors: NamedTensors) -> int:
    """Return the rank of the cores that a scale belongs to."""
    heads, width, _ = tensors[scale.removesuffix("_scale")].shape
    return heads * width


def is_random_factor(name: str) -> bool:
    """Return whether a tensor is the factor that is drawn at random."""
    return any(part in RANDOM_FACTORS for part in name.split("."))


def is_zero_factor(name: str) -> bool:
    """Return whether a tensor is the factor that starts at zero."""
    return any(part in _ZERO_FACTORS for part in name.split("."))


def no_factors(names: Names, round_number: int) -> Names:
    """Return the names of the tensors that are no LoRA factor, in every round."""
    return frozenset(name for name in names if not is_random_factor(name) and not is_zero_factor(name))


def without_random_factors(names: Names, round_number: int) -> Names:
    """Return all names but those of the random factors, in every round."""
    return frozenset(name for name in names if not is_random_factor(name))


def without_zero_factors(names: Names, round_number: int) -> Names:
    """Return all names but those of the factors that start at zero, in every round."""
    return frozenset(name for name in names if not is_zero_factor(name))
