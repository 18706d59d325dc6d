"""The frozen base model: found, checked, loaded once per process, shared by every site that this process simulates."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from conf.pooling import POOLING_FILE
from conf.schema.model import Model
from conf.schema.task import Task
from finetuning.batches import collate
from finetuning.embedded import resolve
from finetuning.made_up import made_up_examples
from finetuning.reached import reached_modules
from finetuning.tasks.build import build_objective
from finetuning.vocabulary import check_vocabulary, positions, rows_of, stated_positions
from finetuning.weights import load_network
from protocol.errors import ModelError

__all__ = [
    "FrozenBase",
    "base_digest",
    "checkpointing",
    "load_base",
    "load_tokenizer",
    "pick_device",
    "read_base",
    "stated_context",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_WEIGHTS, _OLD_WEIGHTS = "*.safetensors", "*.bin"
_SPECIAL = ("special_tokens_map.json", "added_tokens.json")
_IDENTITY = (
    "config.json",
    POOLING_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    *_SPECIAL,
)
_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_PROBED = (12, 9, 6, 4)
"""Tokens of the made-up examples that show which modules a task reaches."""


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
    vocabulary: int
    """Token ids that the model knows: 0 to one less."""
    reached: frozenset[str]
    """Modules with weights that the task's loss depends on; others, such as a tower for pictures, take no adapter."""
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
    return stated_positions(config, pad if isinstance(pad, int) else None)


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
    return read_base(model, task, device)


def read_base(model: Model, task: Task, device: torch.device) -> FrozenBase:
    """Return a base that is shared with nobody.

    Raises:
        ModelError: as `load_base`.
    """
    folder = _folder(model)
    tokenizer = _tokenizer(folder)
    network, fresh = load_network(folder, model, task)
    network.to(device)  # pyright: ignore[reportArgumentType] - its stub takes the device for the network itself
    network.requires_grad_(False)
    network.config.use_cache = False
    pad = tokenizer.pad_token_id
    if not isinstance(pad, int):
        raise ModelError(f"the tokenizer of {model.path} has neither a padding nor an end-of-text token; add one to it")
    _agree_on_tokens(network, tokenizer, pad)
    check_vocabulary(model.path, tokenizer, network)
    context = positions(network)
    reached = _reached(network, tokenizer, task, context, fresh, pad)
    return FrozenBase(
        network, tokenizer, _digest(folder), device, pad, positions(network, reached), rows_of(network), reached, fresh
    )


def _agree_on_tokens(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pad: int) -> None:
    """Tell the network which tokens are padding and the end: classifiers look for the last one before it, or for it."""
    for config in (network.config, network.config.get_text_config()):
        config.pad_token_id = pad
        if config.is_encoder_decoder and isinstance(tokenizer.eos_token_id, int):
            config.eos_token_id = tokenizer.eos_token_id


def _reached(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    context: int | None,
    fresh: tuple[str, ...],
    pad: int,
) -> frozenset[str]:
    classes = None if task.labels is None else len(task.labels)
    examples = made_up_examples(tokenizer, rows_of(network), _PROBED, classes=classes, context=context)
    batches = [collate(part, pad) for part in (examples, *([example] for example in examples))]
    return reached_modules(network, build_objective(task), batches[0], batches[1:], fresh)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if _is_encoder_decoder(folder) and tokenizer.eos_token is not None:
        # BART's classifier reads the state at the end of the text, and T5's knows no other sign of it.
        tokenizer.sep_token = tokenizer.eos_token
    return tokenizer


def _is_encoder_decoder(folder: Path) -> bool:
    try:
        return bool(AutoConfig.from_pretrained(folder, trust_remote_code=False).is_encoder_decoder)
    except (OSError, ValueError, KeyError, AttributeError):
        return False  # the network's own error will say more


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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
