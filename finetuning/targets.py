"""On which layers of a base LoRA is put, and which are trained whole."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from conf.schema.model import LoRA
from finetuning.models import FrozenBase
from finetuning.weights import head_name
from protocol.errors import ModelError

__all__ = ["chosen_layers", "layers_at", "trained_whole"]

_log = logging.getLogger(__name__)
_STATE_SPACE = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_READ_BY_KERNELS = ("out_proj", "conv1d")
"""Layers whose weights the kernels of state-space models read without calling the layer: PEFT refuses them."""


def chosen_layers(base: FrozenBase, config: LoRA, whole: Collection[str], rank: int) -> list[str]:
    """Return the names of the layers that get LoRA at a rank, sorted.

    `auto` is every linear layer inside the blocks (not the embedding's transpose, and none that is trained whole) that
    the task reaches and that is not smaller than the rank: LoRA on those would have more values than the layer.
    `none` is no layer.

    Raises:
        ModelError: a named module that does not exist, is no layer, or that the task never runs; a rank above a named
            layer's size, or above that of all.
    """
    if config.targets == "none":
        return []
    modules = dict(base.network.named_modules())
    linear = _linear_layers(base, modules, whole)
    if config.targets != "auto":
        names = _matching(base, modules, config.targets, linear)
        for name in names:
            _check_rank(name, modules[name], rank)
        return names
    reached = [name for name in linear if name in base.reached]
    _say("the task never runs them", [name for name in linear if name not in base.reached])
    names = layers_at({name: _size(modules[name]) for name in reached}, rank)
    if not names:
        if not reached:
            raise ModelError(f"{type(base.network).__name__} has no linear layer for LoRA; name some in peft.targets")
        widest = max(reached, key=lambda name: min(_size(modules[name])))
        _check_rank(widest, modules[widest], rank)
    _say(f"smaller than peft.rank={rank}", [name for name in reached if name not in names])
    return names


def layers_at(sizes: Mapping[str, tuple[int, ...]], rank: int) -> list[str]:
    """Return the layers that are not smaller than a rank, sorted; `sizes` are those of their weights."""
    return sorted(name for name, size in sizes.items() if min(size) >= rank)


def trained_whole(base: FrozenBase) -> tuple[str, ...]:
    """Return the classification head, and what else the checkpoint lacks (BERT's pooler, often): random, so no base.

    New modules that the task never runs are left out. PEFT finds modules by the end of their names, so DistilBERT's
    `pre_classifier` goes with its `classifier`.
    """
    head = head_name(base.network)
    wanted = [head, *(name for name in base.fresh if not _inside(name, [head]) and name in base.reached)]
    found = [name for name, _ in base.network.named_modules() if name and name.endswith(tuple(wanted))]
    outer = [name for name in found if not _inside(name, [other for other in found if other != name])]
    return tuple(dict.fromkeys([*wanted, *outer]))


def _linear_layers(base: FrozenBase, modules: Mapping[str, nn.Module], whole: Collection[str]) -> list[str]:
    output = base.network.get_output_embeddings()
    return sorted(
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and not _inside(name, whole)
        if base.network.config.model_type not in _STATE_SPACE or name.rpartition(".")[2] not in _READ_BY_KERNELS
    )


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _matching(
    base: FrozenBase, modules: Mapping[str, nn.Module], endings: tuple[str, ...], linear: Sequence[str]
) -> list[str]:
    leaves = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear if name in base.reached}))
    matched: set[str] = set()
    for ending in endings:
        found = [name for name in modules if name and (name == ending or name.endswith(f".{ending}"))]
        if not found:
            near = difflib.get_close_matches(ending, leaves.split(", "), n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ModelError(f"peft.targets: no module of this model is named {ending!r}{hint} Linear layers: {leaves}")
        for name in found:
            if not isinstance(modules[name], nn.Linear | Conv1D | nn.Embedding):
                raise ModelError(
                    f"peft.targets: {name} is a {type(modules[name]).__name__}, neither a linear layer nor an "
                    f"embedding. Linear layers: {leaves}"
                )
        idle = [name for name in found if name not in base.reached]
        if len(idle) == len(found):
            raise ModelError(
                f"peft.targets: {ending} names {len(idle)} module(s) that this task never runs, or whose result its "
                f"loss does not depend on, such as {idle[0]}: an adapter there would only become noise; leave it out. "
                f"Linear layers that run: {leaves}"
            )
        _say(f"peft.targets names them by {ending}, and the task never runs them", idle)
        matched.update(name for name in found if name in base.reached)
    return sorted(matched)


def _size(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else ()


def _check_rank(name: str, module: nn.Module, rank: int) -> None:
    size = _size(module)
    if size and rank > min(size):
        raise ModelError(
            f"peft.rank={rank} is above the size of {name} ({size[0]} x {size[1]}); use at most {min(size)}"
        )


def _say(why: str, names: Sequence[str]) -> None:
    if names:
        _log.info("no adapter on %d layer(s), such as %s: %s", len(names), names[0], why)
