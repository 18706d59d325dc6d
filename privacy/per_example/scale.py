"""Norms: y = n(x) · w + b elementwise, where n normalizes each position alone and has no parameter.

For one example dw = Σₜ gₜ · n(xₜ) and db = Σₜ gₜ: the gradient of the example's own view of w and b.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import nn

from privacy.per_example.recorder import Forward, Recorder

__all__ = ["norm_rule"]


def norm_rule(module: nn.Module, recorder: Recorder) -> Forward | None:
    """Return the forward of a layer norm, of an RMS norm of torch or of `transformers`; None for other modules."""
    if type(module) is nn.LayerNorm:
        return _layer_norm(module, recorder)
    if type(module) is nn.RMSNorm:
        return _rms_norm(module, recorder)
    if _is_rms_norm_of_a_model(module):
        return _with_own_weight(module, recorder)
    return None


def _layer_norm(module: nn.LayerNorm, recorder: Recorder) -> Forward | None:
    if len(module.normalized_shape) != 1:
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps) * recorder.copies(module.weight, x)
        # `bias=False` leaves None, against torch's own annotation.
        return y if getattr(module, "bias", None) is None else y + recorder.copies(module.bias, x)

    return forward


def _rms_norm(module: nn.RMSNorm, recorder: Recorder) -> Forward | None:
    if len(module.normalized_shape) != 1:
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, module.normalized_shape, eps=module.eps) * recorder.copies(module.weight, x)

    return forward


def _is_rms_norm_of_a_model(module: nn.Module) -> bool:
    """Every architecture of `transformers` has a class of its own, ending in RMSNorm, with one vector `weight`."""
    held = dict(module.named_parameters())
    return type(module).__name__.endswith("RMSNorm") and held.keys() == {"weight"} and held["weight"].dim() == 1


def _with_own_weight(module: nn.Module, recorder: Recorder) -> Forward:
    """Run the class's own forward on a stand-in whose weight is one view per example, so every variant is itself.

    (Gemma multiplies by 1 + w, Llama by w, and they cast at different points.)
    """
    weight: nn.Parameter = module.weight  # type: ignore[assignment]

    def forward(x: torch.Tensor) -> torch.Tensor:
        stand_in = copy(module)
        stand_in.__dict__["_parameters"] = {}
        stand_in.__dict__["weight"] = recorder.copies(weight, x)
        return type(module).forward(stand_in, x)

    return forward
