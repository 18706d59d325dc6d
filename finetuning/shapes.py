"""How many values an adapter trains.

For the common architectures the headers of the checkpoint tell: no weight is read, no library loaded. What another one
runs of its modules only the network itself can say, so it is loaded, as a run does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.pooling import states_mean
from conf.schema.model import LoRA, Model
from conf.schema.strategy import Strategy
from conf.schema.task import Task
from finetuning.embedded import resolve

__all__ = ["AdapterSizes", "adapter_sizes", "trained_values"]

_EMBEDDINGS = ("embed", "wte", "wpe")
_OUTPUTS = ("lm_head", "cls", "embed_out", "score", "classifier")
_TRANSPOSED = ("gpt2",)
"""Architectures whose checkpoints hold linear layers as (in, out)."""
_DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2")
_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert")
"""Architectures that run every linear layer that they have; the classifiers of these encoders have a dense layer before
the labels, which most checkpoints lack."""
_WRAPPERS = re.compile(r"^(?:module\.)+|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?:module\.)?")
"""As `finetuning.weights` has it, without loading torch."""


@dataclass(frozen=True)
class AdapterSizes:
    """The layers that LoRA can be put on, and what is trained whole."""

    layers: Mapping[str, tuple[int, int, bool]]
    """Outputs, inputs, and whether it is an embedding (whose rows are the outputs), by name."""
    head: int
    """Values of the classification head, and of what else is new."""
    named: bool
    """Whether `peft.targets` names the layers: a rank above a layer's size is an error then, no reason to skip it."""

    def values(self, rank: int, peft: LoRA, strategy: Strategy) -> int:
        """Return what a site trains in round 1 at a rank."""
        total = self.head
        for outputs, inputs, embedding in self.layers.values():
            if rank > min(outputs, inputs) and not self.named:
                continue
            # Of an embedding, PEFT's factor of zeros is the one over the vocabulary: `outputs`, as for a linear layer.
            if strategy.cores:
                # A lone core has no use for a scale of its own.
                total += rank**2 // strategy.cores + (strategy.cores if strategy.kind == "ravan" else 0)
            else:
                total += rank * (outputs + inputs if strategy.trains == "both" else outputs)
            if peft.dora:
                total += inputs if embedding else outputs
        return total


def trained_values(model: Model, peft: LoRA, strategy: Strategy, task: Task) -> int | None:
    """Return the number of values that each site trains in round 1; None where the checkpoint is not on this machine.

    Raises:
        ModelError: an architecture that has to be loaded for the count, and cannot.
    """
    sizes = adapter_sizes(model, peft, task)
    return None if sizes is None else sizes.values(peft.rank, peft, strategy)


def adapter_sizes(model: Model, peft: LoRA, task: Task) -> AdapterSizes | None:
    """Return the layers of an adapter; None where the checkpoint is not on this machine.

    Raises:
        ModelError: as `trained_values`.
    """
    folder = _local_folder(model)
    if folder is None or not (folder / "config.json").is_file():
        return None
    shapes = dict(_shapes(folder))
    if not shapes:
        return None
    config = json.loads((folder / "config.json").read_text())
    layers = _targets(shapes, config, peft)
    if _is_plain(shapes, config, peft, task, layers, pools_mean=states_mean(folder)):
        return AdapterSizes(layers, _head(config, task), not isinstance(peft.targets, str))
    from finetuning.built_sizes import built_sizes

    return built_sizes(model, peft, task)


def _is_plain(
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    peft: LoRA,
    task: Task,
    layers: Mapping[str, tuple[int, int, bool]],
    *,
    pools_mean: bool,
) -> bool:
    """Whether the headers tell everything."""
    kind = config.get("model_type")
    if task.kind == "classification" and pools_mean:
        return False
    if kind not in (_ENCODERS if task.kind == "classification" else ()) + _DECODERS:
        return False
    if not isinstance(peft.targets, str) and not all(any(_ends(name, end) for name in layers) for end in peft.targets):
        return False
    parts = {part for name in shapes for part in name.split(".")}
    return kind in _DECODERS or not parts & {"pooler", "classifier"}


def _targets(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], peft: LoRA
) -> dict[str, tuple[int, int, bool]]:
    """Return module name -> (outputs, inputs, embedding) of what LoRA may be put on."""
    flipped = config.get("model_type") in _TRANSPOSED
    found: dict[str, tuple[int, int, bool]] = {}
    for key, shape in shapes.items():
        if not key.endswith(".weight") or len(shape) != 2:
            continue
        name = key.removesuffix(".weight")
        parts = name.split(".")
        if peft.targets == "none":
            wanted = False
        elif peft.targets == "auto":
            wanted = not _is_embedding(name) and not any(part in _OUTPUTS for part in parts)
        else:
            wanted = any(_ends(name, ending) for ending in peft.targets)
        if wanted:
            embedding = _is_embedding(name)
            outputs, inputs = (shape[1], shape[0]) if flipped and not embedding else shape
            found[name] = outputs, inputs, embedding
    return found


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _is_embedding(name: str) -> bool:
    return any(mark in part for part in name.split(".") for mark in _EMBEDDINGS)


def _head(config: Mapping[str, Any], task: Task) -> int:
    """Return the values of a classification head, which is trained whole."""
    if task.kind != "classification":
        return 0
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    labels = len(task.labels)
    if config.get("model_type") not in _ENCODERS:
        return hidden * labels
    return hidden * hidden + hidden + hidden * labels + labels


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor: a safetensors file begins with its length and a JSON header."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__" and math.prod(entry["shape"]):
                yield _WRAPPERS.sub("", name), tuple(entry["shape"])


def _local_folder(model: Model) -> Path | None:
    try:
        folder = Path(resolve(model.path))
    except ValueError:
        return None
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.path, revision=model.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
