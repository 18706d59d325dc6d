"""What was folded into the base, at work: y = W₀x + s·BAx + s·L(Rx), with L and R frozen (`protocol/offsets.py`).

A forward hook on each LoRA layer adds the last term. The trained factors keep their own forwards, so every way of
taking per-example gradients works as without it, and the shared base keeps its weights and its digest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from conf.schema.model import LoRA
from protocol.errors import ModelError, ReplyRejected
from protocol.offsets import is_offset, modules_with_offsets, offset_names, verify_offset
from protocol.tensors import NamedTensors

__all__ = ["FrozenOffsets", "without_offsets"]

_ADAPTER = "default"


class FrozenOffsets:
    """The offsets that a network's LoRA layers now apply."""

    def __init__(self, layers: Mapping[str, LoraLayer]) -> None:
        """Start without any.

        Args:
            layers: by their prefix in PEFT state-dict names.
        """
        self._layers = layers
        self._handles: list[RemovableHandle] = []

    def load(self, tensors: NamedTensors) -> None:
        """Apply these offsets and no others.

        Raises:
            ModelError: an offset of an unknown layer, of the wrong shape, or of a DoRA layer.
        """
        self.clear()
        for module in modules_with_offsets(tensors):
            layer: Any = self._layers.get(module)
            if layer is None or layer.lora_variant:
                raise ModelError(f"an offset is given for {module}, which is no plain LoRA layer of this model")
            base = layer.get_base_layer()
            embeds = isinstance(base, nn.Embedding)
            shape = (base.num_embeddings, base.embedding_dim) if embeds else (layer.out_features, layer.in_features)
            try:
                verify_offset(tensors, module, *shape)
            except ReplyRejected as problem:
                raise ModelError(f"the offset does not fit this model: {problem}") from problem
            left, right = (tensors[name].to(base.weight.device) for name in offset_names(module))
            hook = _embedding_hook if embeds else _linear_hook
            self._handles.append(layer.register_forward_hook(hook(left * layer.scaling[_ADAPTER], right)))

    def clear(self) -> None:
        """Apply none."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def without_offsets(tensors: NamedTensors, config: LoRA) -> tuple[dict[str, torch.Tensor], LoRA]:
    """Return an adapter of the same effect whose factors hold the offsets: B' = [B, L], A' = [A; R], at a higher rank.

    The rank is that of the largest offset more, the same for all layers (zeros fill up), and α grows with it, so that
    the scale stays what it was.
    """
    most = max((tensors[offset_names(module)[1]].shape[0] for module in modules_with_offsets(tensors)), default=0)
    merged = {name: tensor for name, tensor in tensors.items() if not is_offset(name)}
    if most == 0:
        return merged, config
    for name, tensor in merged.items():
        module, _, rest = _split(name)
        if not rest:
            continue
        left, right = (tensors.get(each) for each in offset_names(module))
        # An embedding's ΔW is (BA)ᵀ: there A goes with the left factor.
        rows, columns = (left, right) if rest.startswith("lora_embedding") else (right, left)
        if rest.startswith(("lora_A", "lora_embedding_A")):
            own = None if rows is None else (rows.T if rest.startswith("lora_embedding") else rows)
            merged[name] = torch.cat([tensor, _filled(own, (most, tensor.shape[1]))])
        else:
            own = None if columns is None else (columns.T if rest.startswith("lora_embedding") else columns)
            merged[name] = torch.cat([tensor, _filled(own, (tensor.shape[0], most))], dim=1)
    return merged, config.at_rank(config.rank + most)


def _split(name: str) -> tuple[str, str, str]:
    """Return a LoRA factor's module and what follows it; an empty rest for any other tensor."""
    for part in (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B"):
        module, found, rest = name.partition(part)
        if found and (not rest or rest.startswith(".")):
            return module, found, found[1:] + rest
    return name, "", ""


def _filled(tensor: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
    filled = torch.zeros(shape)
    if tensor is not None:
        filled[: tensor.shape[0], : tensor.shape[1]] = tensor
    return filled


def _linear_hook(left: torch.Tensor, right: torch.Tensor) -> Callable[..., torch.Tensor]:
    def add(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(args[0].to(right.dtype), right)
        return (output + nn.functional.linear(low, left)).to(output.dtype)

    return add


def _embedding_hook(left: torch.Tensor, right: torch.Tensor) -> Callable[..., torch.Tensor]:
    def add(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        added = nn.functional.embedding(args[0], left) @ right
        # Gemma scales its embedding inside the layer; PEFT scales what it adds in the same way.
        scale = getattr(module.get_base_layer(), "embed_scale", None)
        return (output + (added if scale is None else added * torch.as_tensor(scale).to(added))).to(output.dtype)

    return add
