"""How many values an adapter trains, from the headers of the checkpoint alone: no weight is read, no library loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conf.schema.model import LoRA, Model
from conf.schema.strategy import Strategy
from conf.schema.task import Task
from finetuning.embedded import resolve

__all__ = ["trained_values"]

_EMBEDDINGS = ("embed", "wte", "wpe")
_OUTPUTS = ("lm_head", "cls", "embed_out", "score", "classifier")
_TRANSPOSED = ("gpt2",)
"""Architectures whose checkpoints hold linear layers as (in, out)."""
_DENSE_HEADS = ("bert", "roberta", "xlm-roberta", "camembert")
"""Encoders whose classifier has a dense layer before the labels, which most checkpoints lack."""


def trained_values(model: Model, peft: LoRA, strategy: Strategy, task: Task) -> int | None:
    """Return the number of values that each site trains in round 1; None where the checkpoint is not on this machine.

    Exact for decoders with linear layers of their own (Llama, Qwen, Mistral, Gemma, Phi, GPT-2), and for BERT and
    RoBERTa with a fresh classification head.
    """
    folder = _local_folder(model)
    if folder is None or not (folder / "config.json").is_file():
        return None
    shapes = dict(_shapes(folder))
    if not shapes:
        return None
    config = json.loads((folder / "config.json").read_text())
    total = _head(config, task)
    for name, (outputs, inputs) in _targets(shapes, config, peft).items():
        # Of an embedding, PEFT's factor of zeros is the one over the vocabulary: `outputs` here, as for a linear layer.
        if strategy.cores:
            # A lone core has no use for a scale of its own.
            total += peft.rank**2 // strategy.cores + (strategy.cores if strategy.kind == "ravan" else 0)
        else:
            total += peft.rank * (outputs + inputs if strategy.trains == "both" else outputs)
        if peft.dora:
            total += inputs if _is_embedding(name) else outputs
    return total


def _targets(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], peft: LoRA
) -> dict[str, tuple[int, int]]:
    """Return module name -> (outputs, inputs) of what LoRA is put on."""
    flipped = config.get("model_type") in _TRANSPOSED
    found: dict[str, tuple[int, int]] = {}
    for key, shape in shapes.items():
        if not key.endswith(".weight") or len(shape) != 2:
            continue
        name = key.removesuffix(".weight")
        parts = name.split(".")
        if peft.targets == "auto":
            wanted = not _is_embedding(name) and not any(part in _OUTPUTS for part in parts)
        else:
            wanted = any(name == ending or name.endswith(f".{ending}") for ending in peft.targets)
        if wanted:
            found[name] = (shape[1], shape[0]) if flipped and not _is_embedding(name) else (shape[0], shape[1])
    return found


def _is_embedding(name: str) -> bool:
    return any(mark in part for part in name.split(".") for mark in _EMBEDDINGS)


def _head(config: Mapping[str, Any], task: Task) -> int:
    """Return the values of a classification head, which is trained whole."""
    if task.kind != "classification":
        return 0
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    labels = len(task.labels)
    if config.get("model_type") not in _DENSE_HEADS:
        return hidden * labels
    return hidden * hidden + hidden + hidden * labels + labels


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor: a safetensors file begins with its length and a JSON header."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__" and math.prod(entry["shape"]):
                yield name, tuple(entry["shape"])


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
