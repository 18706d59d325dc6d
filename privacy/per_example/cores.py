"""Square cores of LoRA: y = blockdiag(c₁H₁, …, c_hH_h) z, with H of shape (h, d, d) and c of shape (h).

For one example dHᵢ = cᵢ Σₜ gₜᵢ zₜᵢᵀ and dcᵢ = Σₜ gₜᵢ · Hᵢzₜᵢ: the gradients of the example's own view of H and c.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from privacy.per_example.recorder import Forward, Recorder

__all__ = ["cores_rule"]


def cores_rule(module: nn.Module, recorder: Recorder) -> Forward | None:
    """Return the forward of a layer of square cores; None for other modules."""
    if type(module).__name__ != "HeadCores":
        return None
    layer: Any = module

    def forward(z: torch.Tensor) -> torch.Tensor:
        heads, width, _ = layer.weight.shape
        examples = len(z)
        cores = recorder.copies(layer.weight, z).reshape(-1, heads, width, width).expand(examples, -1, -1, -1)
        scales = recorder.copies(layer.scale, z).reshape(-1, heads).expand(examples, -1)
        parts = z.reshape(examples, -1, heads, width)
        return torch.einsum("nthb,nhab,nh->ntha", parts, cores, scales).reshape(z.shape)

    return forward
