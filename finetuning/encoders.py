"""How a text becomes token ids in which only the given special tokens are special.

The usual switch, `split_special_tokens`, is not enough: it is one switch for a whole text, it leaves alone what is not
marked as special, and a tokenizer whose vocabulary holds `</s>` as a word (unigram) finds it all the same. So a copy of
the tokenizer is made that knows its special tokens under other names, which no text holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from finetuning.prompts import Segment
from finetuning.special_tokens import NO_SPECIALS, SpecialTokens
from protocol.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "FastEncoder", "PlainEncoder", "fast_encoder", "special_ids"]


@dataclass(frozen=True)
class Encoded:
    """Token ids of the joint text of some segments.

    `offsets` [T, 2] holds the characters from which each token was made, half open, or None where they are not known.
    """

    ids: list[int]
    offsets: NDArray[np.int64] | None
    ends: NDArray[np.int64]
    """Where each segment ends in that text."""


@dataclass(frozen=True, eq=False)
class FastEncoder:
    """Encodes with a copy of a fast tokenizer."""

    backend: Tokenizer
    specials: SpecialTokens
    special_ids: Mapping[str, int]
    mark: str | None
    """Stands around the new name of each special token; None: they have their names, and text that spells them has
    their ids."""

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[Encoded | None]:
        """Return each row's joint text as ids; None where a special token was not found, or was found in text."""
        if not rows:
            return []
        spelled = [self._spelled(row) for row in rows]
        # One call for all rows lets the tokenizer use every core.
        encodings = self.backend.encode_batch(["".join(pieces) for pieces in spelled], add_special_tokens=False)
        return [self._checked(row, pieces, found) for row, pieces, found in zip(rows, spelled, encodings, strict=True)]

    def _spelled(self, row: Sequence[Segment]) -> list[str]:
        mark = self.mark
        if mark is None:
            return [each.text for each in row]
        return [self.specials.hidden(each.text, mark) if each.special else each.text for each in row]

    def _checked(self, row: Sequence[Segment], pieces: list[str], encoding: Any) -> Encoded | None:
        ids = cast("list[int]", encoding.ids)
        is_special = np.isin(ids, list(self.special_ids.values()))
        written = sum(each.special and each.text in self.special_ids for each in row)
        if self.mark is not None and is_special.sum() != written:
            return None
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        if len({each.trained for each in row}) < 2:  # nothing to tell apart
            return Encoded(ids, None, ends)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        text = "".join(pieces)
        for index in np.flatnonzero(is_special):
            # A special token may take the white space beside it along; it still stands where it was written.
            start, end = offsets[index]
            offsets[index, 1] = start + max(len(text[start:end].rstrip()), 1)
        return Encoded(ids, offsets if _is_reliable(text, offsets) else None, ends)


@dataclass(frozen=True, eq=False)
class PlainEncoder:
    """Encodes with the tokenizer as it is: for tokenizers of which there is no fast copy."""

    tokenizer: PreTrainedTokenizerBase
    specials: SpecialTokens
    special_ids: Mapping[str, int]

    def encode(self, row: Sequence[Segment]) -> Encoded:
        """Return a row's joint text as ids.

        Raises:
            DataError: the text spells a special token that this tokenizer cannot take as text.
        """
        ends = np.cumsum([len(each.text) for each in row], dtype=np.int64)
        runs = _runs(row)
        spelled = [name for text, special in runs if not special for name in self.specials.found_in(text)]
        if not spelled:
            return Encoded(self._ids("".join(text for text, _ in runs)), None, ends)
        ids: list[int] = []
        for text, special in runs:
            ids.extend(self._ids(text) if special else self._ids(text, split_special_tokens=True))
        written = sum(special and text in self.special_ids for text, special in runs)
        if np.isin(ids, list(self.special_ids.values())).sum() != written:
            raise DataError(
                f"the text holds the special token {spelled[0]!r}, which the tokenizer of "
                f"{self.tokenizer.name_or_path!r} cannot read as text; take it out of the record, or set "
                "data.special_tokens=parsed to have it read as the token"
            )
        return Encoded(ids, None, ends)

    def _ids(self, text: str, **options: Any) -> list[int]:
        # Not verbose: what is too long is reported with its row.
        found = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)
        return cast("list[int]", found["input_ids"])


def fast_encoder(
    tokenizer: PreTrainedTokenizerBase, specials: SpecialTokens, mark: str | None, samples: Sequence[Sequence[Segment]]
) -> FastEncoder | None:
    """Return an encoder that agrees with the tokenizer on `samples`, or None where there is none.

    Args:
        tokenizer: whose ids to give.
        specials: its special tokens.
        mark: a character that no text holds; None: text that spells a special token is that token.
        samples: rows on which this makes no difference.
    """
    if not getattr(tokenizer, "is_fast", False) or not isinstance(
        getattr(tokenizer, "backend_tokenizer", None), Tokenizer
    ):
        return None
    encoder = _copied(tokenizer, specials, mark, len(tokenizer))
    if encoder is None:
        return None
    plain = PlainEncoder(tokenizer, NO_SPECIALS, encoder.special_ids)
    for row, found in zip(samples, encoder.encode(samples), strict=True):
        if found is None or found.ids != plain.encode(row).ids:
            return None  # a tokenizer that does more than its backend
    return encoder


def special_ids(tokenizer: PreTrainedTokenizerBase, specials: SpecialTokens) -> dict[str, int]:
    """Return the id of each special token that no text can have. That of unknown text it can, unless the same token
    also begins or ends a text: then the tokenizer knows every character, and only its class asks for such a token."""
    ids = cast("list[int]", tokenizer.convert_tokens_to_ids(list(specials.names)))
    found = dict(zip(specials.names, ids, strict=True))
    unknown = tokenizer.unk_token_id
    if unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        found = {name: index for name, index in found.items() if index != unknown}
    return found


@lru_cache(maxsize=2)
def _copied(
    tokenizer: PreTrainedTokenizerBase, specials: SpecialTokens, mark: str | None, size: int
) -> FastEncoder | None:
    """`size`, the number of tokens, tells one state of the same tokenizer object from another."""
    backend = cast("Tokenizer", cast("Any", tokenizer).backend_tokenizer)
    names = {} if mark is None else {name: specials.hidden(name, mark) for name in specials.names}
    try:
        copy = Tokenizer.from_str(json.dumps(_renamed(json.loads(backend.to_str()), names)))
    except Exception:  # the library raises plain Exception for whatever it cannot read back
        return None
    if any(copy.token_to_id(new) != backend.token_to_id(old) for old, new in names.items()):
        return None
    return FastEncoder(copy, specials, special_ids(tokenizer, specials), mark)


def _renamed(spec: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a tokenizer's description with other names for some tokens, in which every id stays what it was."""
    # The post-processor would cut white space from the offsets.
    spec = spec | {"post_processor": None, "truncation": None, "padding": None}
    spec["added_tokens"] = [
        token | {"content": names[token["content"]], "single_word": False, "normalized": False}
        if token["content"] in names
        else token
        for token in spec["added_tokens"]
    ]
    model = dict(spec["model"])
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    elif isinstance(vocabulary, list):  # unigram: [piece, score] in the order of the ids
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    return spec | {"model": model}


def _makes(merge: str | list[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _is_reliable(text: str, offsets: NDArray[np.int64]) -> bool:
    """Whether the offsets run through the text from its start to its end and leave no letter or digit out."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    if len(offsets) and (offsets.min() < 0 or ends.max() > len(text) or np.any(starts > ends)):
        return False
    if np.any(np.diff(ends) < 0):
        return False
    before, after = np.concatenate([[0], ends]), np.concatenate([starts, [len(text)]])
    return not any(_has_letter(text[before[gap] : after[gap]]) for gap in np.flatnonzero(after > before))


def _has_letter(text: str) -> bool:
    return any(map(str.isalnum, text))


def _runs(row: Sequence[Segment]) -> list[tuple[str, bool]]:
    """Return the text between special tokens in one piece each: a special token may be spelled across segments."""
    runs: list[Segment] = []
    for each in row:
        if runs and not each.special and not runs[-1].special:
            runs[-1] = replace(runs[-1], text=runs[-1].text + each.text)
        else:
            runs.append(each)
    return [(run.text, run.special) for run in runs]
