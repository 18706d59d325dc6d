"""What a network has room for: token ids, positions, classes. Anything beyond fails in the forward pass, too late."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetuning.batches import Example
from protocol.errors import ModelError

if TYPE_CHECKING:
    from finetuning.models import FrozenBase

__all__ = ["check_fits", "check_vocabulary", "positions", "rows_of", "stated_positions"]

_STATED = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
"""What configurations call the longest sequence."""
_OFFSET = ("roberta", "xlm-roberta", "camembert")
"""Architectures that state rows of the table of positions, of which they keep the first for padding."""
_TABLES = ("position_embeddings", "position_embedding", "positions_embed", "embed_positions", "pos_embed", "wpe")
_MODALITIES = ("image", "video", "vision", "audio", "speech")
"""In the name of a special token that stands for something else than text: no record of text holds it."""


def rows_of(network: PreTrainedModel) -> int:
    """Return how many token ids the network can read, and write where it writes any."""
    tables: list[Any] = [network.get_input_embeddings(), network.get_output_embeddings()]
    return min(int(table.weight.shape[0]) for table in tables if getattr(table, "weight", None) is not None)


def stated_positions(config: PretrainedConfig, pad_token_id: int | None) -> int | None:
    """Return the longest input in tokens that a configuration states; None where it states none."""
    text = config.get_text_config()  # of a model that also sees or hears
    stated = next((found for name in _STATED if isinstance(found := getattr(text, name, None), int)), None)
    if stated is None or stated <= 0:  # XLNet states -1: no bound
        return None
    return stated - ((pad_token_id or 0) + 1 if text.model_type in _OFFSET else 0)


def positions(network: PreTrainedModel, reached: Collection[str] = ()) -> int | None:
    """Return the longest input in tokens; None where nothing bounds it.

    The configuration states it, and a table of learned positions has so many rows. Some architectures (RoBERTa, BART)
    keep the first rows for padding.

    Args:
        network: the base.
        reached: modules that the task uses; other tables, such as those over the patches of a picture, do not count.
    """
    stated = stated_positions(network.config, network.config.pad_token_id)
    bounds = [] if stated is None else [stated]
    for name, module in network.named_modules():
        if name in reached and name.rpartition(".")[2] in _TABLES and isinstance(module, nn.Embedding):
            kept = 0 if module.padding_idx is None else module.padding_idx + 1
            bounds.append(module.num_embeddings - int(getattr(module, "offset", kept)))
    return min(bounds) if bounds else None


def check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, network: PreTrainedModel) -> None:
    """Check that the network knows every token that a text can become.

    Placeholders for pictures and sound are left out: text-only releases of some models have a tokenizer with them, and
    no room.

    Raises:
        ModelError: naming the highest id and the size of the embedding.
    """
    rows = rows_of(network)
    beyond = {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and not _of_another_modality(token, number, tokenizer)
    }
    pad = tokenizer.pad_token_id
    if isinstance(pad, int) and pad >= rows:
        beyond[str(tokenizer.pad_token)] = pad
    if beyond:
        first = min(beyond, key=beyond.__getitem__)
        raise ModelError(
            f"the tokenizer of {path} has ids up to {max(beyond.values())}, the network an embedding of {rows} rows; "
            f"{len(beyond)} token(s) have no row, the first is {first!r} ({beyond[first]}). Save the model after "
            "resize_token_embeddings, or take the tokens out of its tokenizer"
        )


def check_fits(base: FrozenBase, examples: Sequence[Example], classes: int | None = None) -> None:
    """Check that the network has room for examples, before anything is spent on them.

    Raises:
        ModelError: a token id, a length or a class beyond what it has.
    """
    highest = max((int(example.input_ids.max(initial=0)) for example in examples), default=0)
    if highest >= base.vocabulary:
        raise ModelError(
            f"the records have token ids up to {highest}, the network an embedding of {base.vocabulary} rows; save the "
            "model after resize_token_embeddings, or take the tokens out of its tokenizer"
        )
    longest = max((len(example) for example in examples), default=0)
    if base.context is not None and longest > base.context:
        raise ModelError(
            f"the records have up to {longest} tokens, the network {base.context} positions; set data.max_length to "
            f"at most {base.context}"
        )
    last = max((example.label for example in examples if example.label is not None), default=0)
    if classes is not None and last >= classes:
        raise ModelError(f"the records have classes up to {last}, the head has {classes}; check task.labels")


def _of_another_modality(token: str, number: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    added = tokenizer.added_tokens_decoder.get(number)
    return added is not None and added.special and any(each in token.lower() for each in _MODALITIES)
