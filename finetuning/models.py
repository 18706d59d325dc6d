"""The frozen base model: found, checked, loaded once per process, shared by every site that this process simulates."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from conf.schema.model import Model
from conf.schema.task import Task
from finetuning.embedded import resolve
from protocol.errors import ModelError

__all__ = [
    "FrozenBase",
    "base_digest",
    "checkpointing",
    "load_base",
    "load_tokenizer",
    "pick_device",
    "stated_context",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_log = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WEIGHTS, _OLD_WEIGHTS = "*.safetensors", "*.bin"
_SPECIAL = ("special_tokens_map.json", "added_tokens.json")
_IDENTITY = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    *_SPECIAL,
)
_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
"""What configurations call the longest sequence."""
_HEAD_SEED = 0
"""Layers that the checkpoint lacks start from this seed, so that they are the same at every site."""


@dataclass(frozen=True, eq=False)
class FrozenBase:
    """A loaded base. `network` is shared: nothing but `finetuning.adapters` may attach to it."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    device: torch.device
    pad_token_id: int
    context: int | None
    """The longest sequence the model takes, in tokens, or None where it states none."""
    fresh: tuple[str, ...] = ()
    """Modules that the checkpoint lacks, such as a classification head: trained whole, and kept with the adapter."""


def pick_device(wanted: str) -> torch.device:
    """Return the device that `runtime.device` names; `auto` prefers a GPU.

    Raises:
        ModelError: for `cuda` where there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ModelError("runtime.device=cuda, but torch sees no CUDA device; use runtime.device=auto or cpu")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def load_base(model: Model, task: Task, device: str = "auto") -> FrozenBase:
    """Return the base for a task, loaded on the first call and shared after it.

    Raises:
        ModelError: when it cannot be found or loaded.
    """
    return _load(model, task, pick_device(device))


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, with a padding token (the end-of-text token where it has none of its own).

    Raises:
        ModelError: when it cannot be found or loaded.
    """
    return _tokenizer(_folder(model))


def stated_context(model: Model) -> int | None:
    """Return the longest sequence in tokens that a model takes, without loading it; None where it states none.

    Raises:
        ModelError: when it cannot be found or its configuration cannot be read.
    """
    folder = _folder(model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the configuration in {folder} cannot be read: {_first_line(error)}") from error
    pad = _tokenizer(folder).pad_token_id
    return _context(config, pad if isinstance(pad, int) else None)


def base_digest(model: Model) -> str:
    """Return the SHA-256 (hex) of the files that define the base: configuration, tokenizer and weights.

    Two sites with the same digest train on top of the same function, whatever name their copy has.
    """
    return _digest(_folder(model))


@contextmanager
def checkpointing(network: PreTrainedModel, wanted: bool) -> Generator[None]:
    """Recompute each block's activations in the backward pass instead of keeping them, while inside; changes no number.

    Dropout draws the same masks again. Nothing happens unless `wanted`, or outside of training mode.

    Raises:
        ModelError: an architecture that cannot.
    """
    if not wanted:
        yield
        return
    if not network.supports_gradient_checkpointing:
        raise ModelError(
            f"runtime.gradient_checkpointing=true, but {type(network).__name__} does not support it; set it to false"
        )
    with warnings.catch_warnings():
        # The newer name of these methods is missing in the older releases that are allowed.
        warnings.simplefilter("ignore", FutureWarning)
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # For the reentrant kind alone: it would also compute a gradient of the frozen embedding's output.
        network.disable_input_require_grads()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            network.gradient_checkpointing_disable()


def _once(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Remember results by argument. Configurations are hashable values, which `lru_cache`'s own types cannot see."""
    return cast("Callable[_P, _R]", lru_cache(maxsize=4)(function))


@_once
def _load(model: Model, task: Task, device: torch.device) -> FrozenBase:
    folder = _folder(model)
    tokenizer = _tokenizer(folder)
    network, fresh = _network(folder, model, task)
    network.to(device)  # pyright: ignore[reportArgumentType] - its stub takes the device for the network itself
    network.requires_grad_(False)
    network.config.use_cache = False
    pad = tokenizer.pad_token_id
    if not isinstance(pad, int):
        raise ModelError(f"the tokenizer of {model.path} has neither a padding nor an end-of-text token; add one to it")
    network.config.pad_token_id = pad
    return FrozenBase(network, tokenizer, _digest(folder), device, pad, _context(network.config, pad), fresh)


def _network(folder: Path, model: Model, task: Task) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the network, and the modules that the checkpoint lacks."""
    options: dict[str, Any] = {
        "dtype": _DTYPES[model.dtype],
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    load = AutoModelForCausalLM.from_pretrained
    if task.kind == "classification":
        load = AutoModelForSequenceClassification.from_pretrained
        options["num_labels"] = len(task.labels)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_HEAD_SEED)
            network, loaded = cast("tuple[PreTrainedModel, dict[str, set[str]]]", load(folder, **options))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{model.path} cannot be loaded for task={task.kind}: {_first_line(error)}") from error
    fresh = sorted({key.rsplit(".", 1)[0] for key in loaded["missing_keys"]})
    if fresh and task.kind != "classification":
        raise ModelError(f"{model.path} has no weights for {', '.join(fresh)}; task={task.kind} needs a language model")
    if fresh:
        _log.info("%s lacks %s: initialized from seed %d", model.path, ", ".join(fresh), _HEAD_SEED)
    return network, tuple(fresh)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@_once
def _folder(model: Model) -> Path:
    """Return the local folder behind a path or hub id."""
    try:
        local = Path(resolve(model.path))
    except ValueError as error:
        raise ModelError(str(error)) from error
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(
                f"model.path={model.path} is a folder without config.json; give one that save_pretrained wrote"
            )
        return local
    if model.path.startswith((".", "/", "~")) or model.path.count("/") > 1:
        raise ModelError(f"model.path={model.path} does not exist; give a folder, a hub id, or embedded:clinic-base")
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, RepositoryNotFoundError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"model.path={model.path} is no local folder, and the model hub did not deliver it "
            f"({_first_line(error)}); download it elsewhere and give its folder"
        ) from error


@_once
def _digest(folder: Path) -> str:
    state = hashlib.sha256()
    # The old format is loaded only where the new one is missing; a copy may or may not hold both.
    weights = _WEIGHTS if any(folder.glob(_WEIGHTS)) else _OLD_WEIGHTS
    for path in sorted({path for pattern in (*_IDENTITY, weights) for path in folder.glob(pattern)}):
        with path.open("rb") as stream:
            state.update(f"{path.name}|{hashlib.file_digest(stream, 'sha256').hexdigest()}|".encode())
    return state.hexdigest()


def _context(config: PretrainedConfig, pad_token_id: int | None) -> int | None:
    """Return the longest input in tokens. RoBERTa keeps the first positions for padding."""
    text = config.get_text_config()  # of a model that also sees or hears
    stated = next((found for name in _CONTEXT if isinstance(found := getattr(text, name, None), int)), None)
    if stated is None:
        return None
    is_offset = text.model_type in ("roberta", "xlm-roberta", "camembert")
    return stated - ((pad_token_id or 0) + 1 if is_offset else 0)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
