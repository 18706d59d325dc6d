"""Square cores between frozen factors: ΔW = s·B blockdiag(c₁H₁, …, c_hH_h) A, trained in a few r x r values.

`Cores` stands where PEFT has lora_B: PEFT's own LoRA layer computes s·lora_B(lora_A(x)) and need not know.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from protocol.errors import ModelError
from protocol.tensors import NamedTensors

__all__ = ["CORE", "Cores", "check_cores", "put_cores", "renamed", "reset_cores", "without_cores"]

CORE, _SCALE = "lora_core", "lora_core_scale"
_ADAPTER = "default"


class HeadCores(nn.Module):
    """z ↦ blockdiag(c₁H₁, …, c_hH_h) z on the last dimension, of size h·d.

    `weight` (h, d, d) starts at zero, `scale` (h) at one. The per-example engine has a rule for it by its name.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, width, width))
        self.scale = nn.Parameter(torch.ones(heads))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the image, of the shape of `z`."""
        parts = z.unflatten(-1, self.weight.shape[:2])
        return torch.einsum("...hb,hab,h->...ha", parts, self.weight, self.scale).flatten(-2)


class Cores(nn.Module):
    """z ↦ B (cores z), with B frozen."""

    def __init__(self, up: nn.Linear, heads: int) -> None:
        super().__init__()
        self.core = HeadCores(heads, up.in_features // heads)
        self.up = up

    @property
    def weight(self) -> torch.Tensor:
        """B, for whoever reads a layer's dtype or device."""
        return self.up.weight

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return what a LoRA layer adds, without its scale."""
        return self.up(self.core(z))


def check_cores(name: str, module: nn.Module, rank: int, heads: int) -> None:
    """Check that a target module can have cores.

    Raises:
        ModelError: an embedding, or a rank that the heads do not divide.
    """
    if isinstance(module, nn.Embedding):
        raise ModelError(f"{name} is an embedding, which takes no square cores; leave it out of peft.targets")
    if rank % heads:
        raise ModelError(f"rank {rank} is not divisible by strategy.heads={heads}")


def put_cores(network: nn.Module, heads: int) -> None:
    """Put cores into every LoRA layer of a network."""
    for module in list(network.modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.lora_B[_ADAPTER] = Cores(layer.lora_B[_ADAPTER], heads)


def reset_cores(cores: Cores, rank: int) -> None:
    """Draw B at `rank`, N(0, 1/m), so that its columns have length 1 on average; cores become zero, scales one.

    Both bases follow from the public seed alone. A basis made from gradients of private records (Fed-SB's own
    initialization) would cost privacy that nobody books.
    """
    weight = cores.up.weight
    drawn = torch.empty(weight.shape[0], rank).normal_() / math.sqrt(weight.shape[0])
    weight.copy_(drawn[:, : weight.shape[1]])
    cores.core.weight.zero_()
    cores.core.scale.fill_(1.0)


def renamed(name: str) -> str:
    """Return the adapter's name of a tensor, from PEFT's."""
    for theirs, ours in (
        (f".lora_B.{_ADAPTER}.up.", ".lora_B."),
        (f".lora_B.{_ADAPTER}.core.weight", f".{CORE}"),
        (f".lora_B.{_ADAPTER}.core.scale", f".{_SCALE}"),
    ):
        name = name.replace(theirs, ours)
    return name


def without_cores(tensors: NamedTensors) -> dict[str, torch.Tensor]:
    """Return a plain LoRA adapter of the same effect: B' = B blockdiag(c₁H₁, …, c_hH_h)."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith((f".{CORE}", f".{_SCALE}"))}
    for name, core in tensors.items():
        module, found, _ = name.rpartition(f".{CORE}")
        if found and name.endswith(f".{CORE}"):
            up = f"{module}.lora_B.weight"
            scaled = core * tensors[f"{module}.{_SCALE}"][:, None, None]
            plain[up] = tensors[up] @ torch.block_diag(*scaled)
    return plain
