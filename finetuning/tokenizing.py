"""Segments to token ids, each with whether it is learned; and how long a sequence may be.

The segments of a row are tokenized as one text, the text that the model meets when it is used. Tokenized apart, a
completion would begin as a text of its own does: SentencePiece puts a space before it, and the model would learn to
write that space in the middle of a word.

A token belongs to the segment that holds its last character. So a token that straddles prompt and completion is
learned: the ids are those of the joint text, and no part of the completion goes unlearned. At generation the prompt is
tokenized alone, and where it then ends in other tokens (`"Answer: "` before `"yes"`: the space belongs to ` yes`) the
model meets a prompt that it was not trained on; such rows are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from finetuning.encoders import Encoded, FastEncoder, PlainEncoder, fast_encoder, special_ids
from finetuning.prompts import Segment
from finetuning.rows import at_place
from finetuning.special_tokens import NO_SPECIALS, special_tokens, unused_mark
from protocol.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SpecialsInText", "TokenizedText", "sequence_bound", "tokenize_segments"]

SpecialsInText = Literal["text", "parsed"]
_NO_STATED_LENGTH = 10**9  # tokenizers that state no length report a huge number instead
_SAMPLES = 4
_Encode = Callable[[Sequence[Segment]], Encoded]


@dataclass(frozen=True)
class TokenizedText:
    """The joint text of a row's segments: `ids` and `trained` have equal length."""

    ids: list[int]
    trained: list[bool]
    specials: int
    """Special tokens that the text of the record spells."""
    is_merged: bool
    """Whether a prompt tokenized alone ends in other tokens than before its completion."""


def sequence_bound(wanted: int | None, tokenizer: PreTrainedTokenizerBase, context: int | None) -> int | None:
    """Return the longest sequence in tokens that a run takes; None: no bound is known.

    Args:
        wanted: `data.max_length`.
        tokenizer: may state a length of its own.
        context: the longest sequence that the model takes, where it states one.

    Raises:
        DataError: `wanted` is above the context.
    """
    if wanted is not None:
        if context is not None and wanted > context:
            raise DataError(
                f"data.max_length={wanted} is above the model's context of {context} tokens; use at most {context}"
            )
        return wanted
    stated = tokenizer.model_max_length
    return min((bound for bound in (stated, context) if bound is not None and bound < _NO_STATED_LENGTH), default=None)


def tokenize_segments(
    rows: Sequence[Sequence[Segment]],
    tokenizer: PreTrainedTokenizerBase,
    mode: SpecialsInText = "text",
    places: Sequence[object] = (),
) -> list[TokenizedText]:
    """Return the joint text of each row's segments as token ids.

    Args:
        rows: segments in order; those that are special tokens come as segments of their own.
        tokenizer: gives the ids; no special token is added.
        mode: what the letters of a special token are inside a segment of text: text, or the token.
        places: where each row stands, for errors; by its number here where nothing is given.

    Raises:
        DataError: naming the row, for text that this tokenizer cannot take as text.
    """
    known = special_tokens(tokenizer)
    spelled = [_spelled(row, known.found_in) for row in rows]
    is_text = mode == "text"
    mark = unused_mark(each.text for row in rows for each in row) if is_text else None
    samples = [row for row, count in zip(rows, spelled, strict=True) if not (is_text and count)][:_SAMPLES]
    fast = fast_encoder(tokenizer, known, mark, samples)
    plain = PlainEncoder(tokenizer, known if is_text else NO_SPECIALS, special_ids(tokenizer, known))
    encoded: Sequence[Encoded | None] = [None] * len(rows) if fast is None else fast.encode(rows)
    done: list[TokenizedText] = []
    places = places or [f"row {number}" for number in range(1, len(rows) + 1)]
    for place, row, count, found in zip(places, rows, spelled, encoded, strict=True):
        encode = plain.encode if fast is None or found is None else _one_by_one(fast)
        with at_place(place):
            done.append(_tokenized(row, encode(row) if found is None else found, encode, count))
    return done


def _spelled(row: Sequence[Segment], found_in: Callable[[str], list[str]]) -> int:
    """Return how many special tokens the text of a row spells, also across the segments of it."""
    count, text = 0, ""
    for each in row:
        if each.special:
            count, text = count + len(found_in(text)), ""
        else:
            text += each.text
    return count + len(found_in(text))


def _one_by_one(encoder: FastEncoder) -> _Encode:
    def encode(row: Sequence[Segment]) -> Encoded:
        found = encoder.encode([row])[0]
        return found or Encoded([], None, np.zeros(0, dtype=np.int64))  # a beginning that the whole did not have

    return encode


def _tokenized(row: Sequence[Segment], encoded: Encoded, encode: _Encode, specials: int) -> TokenizedText:
    flags = np.array([each.trained for each in row], dtype=np.bool_)
    if len(set(flags.tolist())) < 2:  # nothing to tell apart
        return TokenizedText(encoded.ids, flags[:1].tolist() * len(encoded.ids), specials, is_merged=False)
    starts = [index for index in range(1, len(row)) if row[index].trained and not row[index - 1].trained]
    if encoded.offsets is None:
        owner, is_merged = _owners_by_beginnings(row, encoded.ids, encode)
    else:
        owner = np.searchsorted(encoded.ends, encoded.offsets[:, 1], side="left")
        is_merged = any(_is_merged(row, start, encoded, encode) for start in starts)
    return TokenizedText(encoded.ids, flags[owner].tolist(), specials, is_merged)


def _is_merged(row: Sequence[Segment], start: int, encoded: Encoded, encode: _Encode) -> bool:
    """Whether a token straddles the start of a segment, and the text before it would not end in it by itself."""
    assert encoded.offsets is not None
    border = encoded.ends[start - 1]
    if not np.any((encoded.offsets[:, 0] < border) & (encoded.offsets[:, 1] > border)):
        return False
    alone = encode(row[:start]).ids
    return alone != encoded.ids[: len(alone)]


def _owners_by_beginnings(row: Sequence[Segment], ids: list[int], encode: _Encode) -> tuple[NDArray[np.int64], bool]:
    """Return each token's segment where offsets do not tell, and whether a prompt alone ends in other tokens.

    What a text and its beginning have in common belongs to the beginning: the first token that differs was made from
    characters that the beginning lacks.
    """
    owner, merged, before = np.zeros(len(ids), dtype=np.int64), False, 0
    for index in range(1, len(row)):
        if row[index].trained == row[index - 1].trained:
            continue
        alone = encode(row[:index]).ids
        common = next((at for at, (one, other) in enumerate(zip(alone, ids, strict=False)) if one != other), None)
        border = max(before, min(len(alone), len(ids)) if common is None else common)
        merged = merged or (row[index].trained and common is not None)
        owner[border:] = index
        before = border
    return owner, merged
