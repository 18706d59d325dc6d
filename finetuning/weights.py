"""A checkpoint's weights go into a network completely, or not at all: what is missing would be random, and frozen.

====================================  ==========================================================================
what is found                         what follows
====================================  ==========================================================================
the task's head is missing            a new one from a public seed, which is trained whole
anything else is missing              refused: the checkpoint is of another architecture, or damaged
weights left over in the blocks       refused: the network would compute something else (fewer layers, no bias)
weights left over elsewhere           another task's head, a tower that the task has no use for: not used
a wrapper's name before the others'   taken off (`torch.compile`, `DataParallel`, FSDP)
a tensor of another shape             refused, both shapes named; of a head, both numbers of classes
====================================  ==========================================================================

Tied weights are stored once, so the others are no loss; `transformers` leaves them out of what is missing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from conf.pooling import states_mean
from conf.schema.model import Model
from conf.schema.task import Classification, Task
from finetuning.mean_pooled import MeanPooledClassifier
from protocol.errors import ModelError

__all__ = ["WRAPPERS", "head_name", "load_network"]

_log = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HEADS = ("score", "classifier", "classification_head")
_HEAD_SEED = 0
"""Layers that the checkpoint lacks start from this seed, so that they are the same at every site."""
WRAPPERS = re.compile(r"^(?:module\.)+|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?:module\.)?")
"""What `torch.compile`, DistributedDataParallel, FSDP and activation checkpointing put into a tensor's name."""
_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|num_batches_tracked|attn\.bias|attention\.bias)$"
)
"""Left over from older releases, which stored what is now computed."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def load_network(folder: Path, model: Model, task: Task) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the network, and the modules that are new: a classification head, or a part of it.

    Raises:
        ModelError: it cannot be read, or its weights are not those of the network that `config.json` describes.
    """
    network, found = _read(folder, model, task, {})
    wrapped = {each.group() for key in found["unexpected_keys"] for each in WRAPPERS.finditer(key)}
    if wrapped:
        # The names as they are in the file are read again, without what the wrapper added.
        mapping = {("^" if each.startswith("module") else "") + re.escape(each): "" for each in sorted(wrapped)}
        network, found = _read(folder, model, task, mapping)
    _check_missing(model.path, network, found, task)
    _check_left_over(model.path, network, found["unexpected_keys"], task)
    fresh = {key.rsplit(".", 1)[0] for key in found["missing_keys"]}
    fresh |= _check_shapes(model.path, network, found["mismatched_keys"], task)
    if isinstance(task, Classification):
        fresh |= _head_anew(model.path, network, fresh, task)
        if _pools_mean(folder, network, fresh, task):
            return MeanPooledClassifier(cast("PreTrainedModel", network.base_model), len(task.labels)), ("classifier",)
    if fresh:
        _log.info("%s: %s initialized from seed %d", model.path, ", ".join(sorted(fresh)), _HEAD_SEED)
    return network, tuple(sorted(fresh))


def _pools_mean(folder: Path, network: PreTrainedModel, fresh: set[str], task: Classification) -> bool:
    """Whether a new head reads the mean of the last states; one that the checkpoint has keeps its own network."""
    if task.pooling == "model" or network.config.is_encoder_decoder:
        return False
    new = head_name(network)
    if not any(each == new or each.startswith(f"{new}.") for each in fresh):
        return False
    return task.pooling == "mean" or states_mean(folder)


def head_name(network: PreTrainedModel) -> str:
    """Return the module that maps to classes: the last one beside the network's body that has weights.

    Raises:
        ModelError: there is none.
    """
    outer = [name for name, child in _beside_the_body(network) if any(True for _ in child.parameters())]
    named = [name for name in outer if name in _HEADS]
    if not named and not outer:
        raise ModelError(f"{type(network).__name__} has no classification head beside its body")
    return named[0] if named else outer[-1]


def _read(
    folder: Path, model: Model, task: Task, mapping: dict[str, str]
) -> tuple[PreTrainedModel, dict[str, set[Any]]]:
    options: dict[str, Any] = {
        "dtype": _DTYPES[model.dtype],
        "trust_remote_code": False,
        "output_loading_info": True,
        # Shapes are compared here, with an error that names them.
        "ignore_mismatched_sizes": True,
    }
    load = AutoModelForCausalLM.from_pretrained
    if isinstance(task, Classification):
        load = AutoModelForSequenceClassification.from_pretrained
        options["num_labels"] = len(task.labels)
    if mapping:
        options["key_mapping"] = mapping
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report on names; ours is an error, or there is nothing to report
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_HEAD_SEED)
            return cast("tuple[PreTrainedModel, dict[str, set[Any]]]", load(folder, **options))
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{model.path} cannot be loaded for task={task.kind}: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_missing(path: str, network: PreTrainedModel, found: dict[str, set[Any]], task: Task) -> None:
    lacking = sorted(found["missing_keys"])
    if isinstance(task, Classification):
        lacking = [key for key in lacking if not _in_head(network, key)]
    if not lacking:
        return
    output = network.get_output_embeddings()
    if all(network.get_submodule(key.rpartition(".")[0]) is output for key in lacking):
        modules = sorted({key.rpartition(".")[0] for key in lacking})
        raise ModelError(f"{path} has no weights for {', '.join(modules)}; task={task.kind} needs a language model")
    spare = sorted(found["unexpected_keys"])
    unused = f"; it has {len(spare)} that the network does not, such as {spare[0]}" if spare else ""
    raise ModelError(
        f"{path} lacks {len(lacking)} of the network's {len(network.state_dict())} tensors, such as {lacking[0]}"
        f"{unused}; they would be random. Give weights and a config.json that belong together (layers, names)"
    )


def _check_left_over(path: str, network: PreTrainedModel, keys: Iterable[str], task: Task) -> None:
    """Refuse weights of the network's own blocks that it would not use."""
    modules = {_NUMBER.sub("0", f".{name}."): each for name, each in network.named_modules()}
    body = _body_name(network)
    odd: list[str] = []
    for key in sorted(keys):
        owner = key.rpartition(".")[0]
        of_head = "pooler" in owner.split(".") or (isinstance(task, Classification) and _in_head(network, key))
        if _BUFFERS.search(key) or of_head:
            continue
        # A checkpoint of the body alone has no prefix.
        names = [_NUMBER.sub("0", f".{each}.") for each in (owner, f"{body}.{owner}") if each]
        if any(_belongs(name, modules) for name in names):
            odd.append(key)
    if odd:
        raise ModelError(
            f"{path} holds {len(odd)} tensor(s) that the network of its config.json has no place for, such as "
            f"{odd[0]}; without them it is another model. Give weights and a config.json that belong "
            "together (layers, biases)"
        )


def _belongs(name: str, modules: Mapping[str, Any]) -> bool:
    """Whether a tensor's owner is a layer of the network, or would stand within one of its numbered blocks."""
    if name in modules:
        return any(True for _ in modules[name].parameters(recurse=False)) or ".0." in name
    blocks = [name[: found.end()] for found in re.finditer(r"\.0\.", name)]
    return any(block in modules for block in blocks)


def _check_shapes(
    path: str, network: PreTrainedModel, mismatched: Iterable[tuple[str, Any, Any]], task: Task
) -> set[str]:
    """Return the modules of a head whose number of classes differs, where a new one is wanted."""
    found = sorted((name, tuple(stored), tuple(needed)) for name, stored, needed in mismatched)
    for name, stored, needed in found:
        if not isinstance(task, Classification) or not _in_head(network, name) or stored[1:] != needed[1:]:
            raise ModelError(
                f"{path} holds {name} of shape {stored}, the network of its config.json needs {needed}; give weights "
                "and a config.json that belong together"
            )
        if task.head == "checkpoint":
            raise ModelError(
                f"{path} cannot be loaded for task={task.kind}: its head is for {stored[0]} classes, task.labels names "
                f"{needed[0]} ({', '.join(task.labels)}); name its classes, or set task.head=new to train a new head"
            )
    return {name.rpartition(".")[0] for name, _, _ in found}


def _head_anew(path: str, network: PreTrainedModel, fresh: set[str], task: Classification) -> set[str]:
    """Return what a new head adds to the new modules; a head that is kept must know its classes in our order."""
    name = head_name(network)
    head = network.get_submodule(name)
    if task.head == "new":
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_HEAD_SEED)
            for module in head.modules():
                for parameter in module.parameters(recurse=False):
                    parameter._is_hf_initialized = False  # pyright: ignore[reportAttributeAccessIssue]
                network._init_weights(module)  # pyright: ignore[reportPrivateUsage]
        return {each for each, module in _named(name, head) if any(True for _ in module.parameters(recurse=False))}
    if not any(each == name or each.startswith(f"{name}.") for each in fresh):
        _check_order(path, network, task)
    return set()


def _check_order(path: str, network: PreTrainedModel, task: Classification) -> None:
    known = [str(each) for _, each in sorted((network.config.id2label or {}).items())]
    ours = [each.casefold() for each in task.labels]
    theirs = [each.casefold() for each in known]
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise ModelError(
            f"{path} has a head that knows the classes as {', '.join(known)}, in that order, task.labels names "
            f"{', '.join(task.labels)}; use its order, or set task.head=new to train a new head"
        )


def _named(name: str, module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return ((f"{name}.{inner}" if inner else name, each) for inner, each in module.named_modules())


def _body_name(network: PreTrainedModel) -> str:
    """Return the child that every task of the architecture has; empty where the network is that itself."""
    body = network.base_model
    return next((name for name, child in network.named_children() if child is body), "")


def _beside_the_body(network: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    body = _body_name(network)
    return [(name, child) for name, child in network.named_children() if name != body]


def _in_head(network: PreTrainedModel, key: str) -> bool:
    """Whether a tensor is the task's: beside the body, or the pooler that only some tasks train."""
    body = _body_name(network)
    first, _, rest = key.partition(".")
    if not body:
        return first in _HEADS
    if first == body:
        return rest.split(".")[0] == "pooler"
    return any(first == name for name, _ in _beside_the_body(network)) or first == "pooler"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
