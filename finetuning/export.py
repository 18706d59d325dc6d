"""The adapter in PEFT's own format, for `PeftModel.from_pretrained`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from finetuning.adapters import AdaptedModel
from finetuning.checkpoints import save_tensors, write_atomically
from finetuning.cores import without_cores
from finetuning.offsets import without_offsets
from protocol.tensors import NamedTensors

__all__ = ["export_adapter"]


def export_adapter(folder: Path, adapted: AdaptedModel, tensors: NamedTensors, *, base: str, card: str) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and a model card.

    Args:
        folder: created where missing.
        adapted: the network that the adapter was made for.
        tensors: the adapter; what was folded into the base becomes part of its factors, at a higher rank.
        base: written as the base model's name: a folder or a hub id that others can resolve.
        card: the README's text.
    """
    tensors, plain = without_offsets(without_cores(tensors), adapted.config)
    config: Any = copy.deepcopy(adapted.network.peft_config["default"])
    config.r, config.lora_alpha = plain.rank, plain.alpha
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_tensors(folder / "adapter_model.safetensors", tensors)
    write_atomically(folder / "README.md", card.encode())
