"""DoRA (Liu et al. 2024, arXiv 2402.09353, section 4.3): y = W₀x + (m/n - 1) W₀x + (m/n) s B(Ax).

n is the row norm of W₀ + s BA, held constant in the backward pass: it takes no gradient, so A and B have their linear
rule, and the magnitude m has dm = Σₜ gₜ · (W₀x + s BAx)ₜ / n, the gradient of the example's own view of m.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from privacy.per_example.recorder import Forward, Recorder

__all__ = ["dora_rule"]


def dora_rule(module: nn.Module, recorder: Recorder) -> Forward | None:
    """Return the forward of PEFT's DoRA on a linear layer: what is added to W₀x; None for other modules."""
    if type(module).__name__ != "DoraLinearLayer":
        return None
    layer: Any = module

    def forward(
        x: torch.Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: Any,
        base_result: torch.Tensor | None = None,
        adapter_name: str = "default",
    ) -> torch.Tensor:
        weight = base_layer.weight.to(x.dtype)
        with torch.no_grad():
            update = layer.get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name).to(x.dtype)
            norm = layer.get_weight_norm(weight=weight, lora_weight=update, scaling=scaling, adapter_name=adapter_name)
        if base_result is None:
            # Dropout came before x, so W₀x is another one than the layer's own.
            base_result = nn.functional.linear(x, weight.T if layer.fan_in_fan_out else weight)
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        scale = recorder.copies(layer.weight, x) / norm
        return (scale - 1) * base_result + scale * lora_B(lora_A(x)) * scaling

    return forward
