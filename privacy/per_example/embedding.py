"""Embeddings: yₜ = W[idₜ]. For one example row v of dW is the sum of gₜ over its positions t with idₜ = v.

LoRA on an embedding (PEFT) is y = W[id] + s · Aᵀ[id] Bᵀ with A of shape (rank, vocabulary) and B of shape (width,
rank), both parameters of the layer itself: a lookup in Aᵀ, and a linear layer B on what was looked up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from privacy.per_example.linear import product
from privacy.per_example.recorder import Deposit, Forward, Recorder, once

__all__ = ["embedding_rule", "lora_embedding_rule"]


def embedding_rule(module: nn.Module, recorder: Recorder) -> Forward | None:
    """Return the forward of an `nn.Embedding` without renormalization or frequency scaling; None for others."""
    if type(module) is not nn.Embedding or _is_special(module):
        return None
    weight: nn.Parameter = module.weight  # type: ignore[assignment]

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return _Lookup.apply(ids, weight, module.padding_idx, recorder.deposit_for(weight))  # type: ignore[return-value]

    return forward


def lora_embedding_rule(module: nn.Module, recorder: Recorder) -> Forward | None:
    """Return the forward of PEFT's LoRA on an embedding with one plain adapter; None for others (DoRA on it, say)."""
    if type(module).__name__ != "Embedding" or not hasattr(module, "lora_embedding_A"):
        return None
    layer: Any = module
    base = layer.get_base_layer()
    names = list(layer.active_adapters)
    if len(names) != 1 or layer.lora_variant or layer.merged or _is_special(base):
        return None
    (name,) = names
    a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]

    def forward(ids: torch.Tensor) -> torch.Tensor:
        result = layer.base_layer(ids)
        if recorder.trains(a):
            deposit = recorder.deposit_for(a)
            low = _Lookup.apply(ids, a.T, base.padding_idx, lambda rows: deposit(rows.mT))
        else:
            low = nn.functional.embedding(ids, a.T, base.padding_idx)
        added = product(low, b, recorder) * layer.scaling[name]
        scale = getattr(base, "embed_scale", None)
        # Gemma scales its embedding inside the layer; PEFT scales what it adds in the same way.
        added = added if scale is None else added * torch.as_tensor(scale).to(added)
        return (result + added).to(result.dtype)

    return forward


def _is_special(module: Any) -> bool:
    return module.max_norm is not None or module.scale_grad_by_freq or module.sparse


class _Lookup(torch.autograd.Function):
    """W[ids] for ids of shape (examples, ...), whose backward deposits (examples, *W's shape)."""

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding_index: int | None, deposit: Deposit
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_index, ctx.deposit = weight.shape, padding_index, deposit
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[None, None, None, None]:
        once(ctx)
        (ids,) = ctx.saved_tensors
        vocabulary, width = ctx.shape
        gradient = outputs[0].reshape(-1, width)
        if ctx.padding_index is not None:
            gradient = gradient * (ids.reshape(-1, 1) != ctx.padding_index)
        examples = len(ids)
        # Example i writes into rows i·vocabulary + id of one long table.
        first_rows = torch.arange(examples, device=ids.device).reshape(-1, *[1] * (ids.dim() - 1)) * vocabulary
        table = torch.zeros(examples * vocabulary, width, dtype=torch.float32, device=ids.device)
        table.index_add_(0, (ids + first_rows).flatten(), gradient.float())
        ctx.deposit(table.view(examples, vocabulary, width))
        return None, None, None, None
