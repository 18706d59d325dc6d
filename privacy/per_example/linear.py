"""Linear layers: y = x Wᵀ + b, with x of shape (examples, ..., in); LoRA's factors A and B are such layers.

For one example dW = Σₜ gₜ xₜᵀ = gᵀ x over its positions t, and db = Σₜ gₜ. All examples at once are one batched matrix
product of as many multiplications as the summed dW takes (Goodfellow 2015, arXiv 1510.01799, keeps norms only; a
factor is so small that its gradients themselves fit).

An input of two dimensions (examples, in), as a classification head has, is one position per example. It is multiplied
example by example: one product of all rows takes a kernel that depends on how many there are, and rounds each row
accordingly, so that an example's gradient would depend on how many were drawn beside it (docs/decisions/0016).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from privacy.per_example.recorder import Deposit, Forward, Recorder, once

__all__ = ["linear_rule", "product", "row_by_row"]


def linear_rule(module: nn.Module, recorder: Recorder) -> Forward | None:
    """Return the forward of an `nn.Linear` or of GPT-2's `Conv1D` (a linear layer that stores Wᵀ); None for others."""
    kind = _kind(module)
    if kind is None:
        return None
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    bias: nn.Parameter | None = module.bias  # type: ignore[assignment]

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = product(x, weight, recorder, transposed=kind == "transposed")
        return y if bias is None else y + recorder.copies(bias, x)

    return forward


def product(x: torch.Tensor, weight: nn.Parameter, recorder: Recorder, *, transposed: bool = False) -> torch.Tensor:
    """Return x Wᵀ (`transposed`: x W), depositing W's per-example gradients in the backward pass if W trains."""
    if not recorder.trains(weight):
        return _multiplied(x, weight, transposed)
    return _Product.apply(x, weight, recorder.deposit_for(weight), transposed)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    """x Wᵀ (or x W), whose backward deposits one weight gradient per example in place of their sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, deposit: Deposit, transposed: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.deposit, ctx.transposed = deposit, transposed
        return _multiplied(x, weight, transposed)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        once(ctx)
        x, weight = ctx.saved_tensors
        gradient = outputs[0]
        down = _multiplied(gradient, weight, not ctx.transposed) if ctx.needs_input_grad[0] else None
        left, right = (x, gradient) if ctx.transposed else (gradient, x)
        ctx.deposit(torch.bmm(_positions(left).mT, _positions(right)))
        return down, None, None, None


def row_by_row(module: nn.Module) -> Forward | None:
    """Return the forward of a frozen `nn.Linear` or `Conv1D` that multiplies each row of two dimensions by itself."""
    kind = _kind(module)
    if kind is None:
        return None
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
    own = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2:
            return own(x)
        y = _multiplied(x, weight, kind == "transposed")
        return y if bias is None else y + bias

    return forward


def _kind(module: nn.Module) -> str | None:
    if type(module) is nn.Linear:
        return "plain"
    is_conv1d = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    return "transposed" if is_conv1d else None


def _multiplied(x: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Return x Wᵀ (`transposed`: x W); rows of two dimensions are products of their own."""
    if x.dim() == 2:
        matrix = weight if transposed else weight.T
        return torch.bmm(x.unsqueeze(1), matrix.expand(len(x), *matrix.shape)).squeeze(1)
    return x @ weight if transposed else nn.functional.linear(x, weight)


def _positions(x: torch.Tensor) -> torch.Tensor:
    """Return (examples, positions, features)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
