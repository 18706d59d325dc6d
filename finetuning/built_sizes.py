"""The layers of an adapter, from the loaded network: exact for every architecture, at the price of loading it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from conf.schema.model import LoRA, Model
from conf.schema.task import Task
from finetuning.models import read_base
from finetuning.shapes import AdapterSizes
from finetuning.targets import chosen_layers, trained_whole

__all__ = ["built_sizes"]


def built_sizes(model: Model, peft: LoRA, task: Task) -> AdapterSizes:
    """Return what `finetuning.adapters.attach` would put LoRA on, at rank 1: higher ranks leave out smaller layers.

    Raises:
        ModelError: the model cannot be loaded, or has no such layers.
    """
    base = read_base(model, task, torch.device("cpu"))
    modules: dict[str, Any] = dict(base.network.named_modules())
    whole = trained_whole(base) if task.kind == "classification" else ()
    layers = {
        name: _size(modules[name])
        for name in chosen_layers(base, peft, whole, 1 if isinstance(peft.targets, str) else peft.rank)
    }
    head = sum(parameter.numel() for name in whole for parameter in modules[name].parameters())
    return AdapterSizes(layers, head, not isinstance(peft.targets, str))


def _size(module: Any) -> tuple[int, int, bool]:
    rows, columns = module.weight.shape
    embedding = isinstance(module, nn.Embedding)
    outputs, inputs = (rows, columns) if embedding or isinstance(module, nn.Linear) else (columns, rows)
    return outputs, inputs, embedding
