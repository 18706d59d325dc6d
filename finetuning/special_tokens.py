"""The strings that a tokenizer takes for tokens of its own, and how a record is kept from writing them.

A model reads `</s>` as the end of a text and `<|im_start|>` as the start of a turn. Only the frame around a record and
a chat template may write these: the same letters inside a record are text, and are spelled out like any other text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["NO_SPECIALS", "SpecialTokens", "special_tokens", "unused_mark"]

_FIRST_MARK, _LAST_MARK = 0xF0000, 0x10FFFD
"""Private-use characters: no text means anything by them, and no normalization form changes them."""

_MARKUP = re.compile(r"[<\[].+[>\]]", re.DOTALL)
_TAG = re.compile(r"</?(\w+)>")


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of one tokenizer, by their strings."""

    names: tuple[str, ...]

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        # The longest first: where two begin at one place, tokenizers take the longer one.
        ordered = sorted(self.names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, ordered))) if ordered else None

    @cached_property
    def _number(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def found_in(self, text: str) -> list[str]:
        """Return the special tokens that a text spells, in order."""
        return [] if self._pattern is None else self._pattern.findall(text)

    def hidden(self, text: str, mark: str) -> str:
        """Return the text with its special tokens replaced by numbers between marks; `mark` must not be in the text."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: f"{mark}{self._number[found[0]]}{mark}", text)

    def shown(self, text: str, mark: str) -> str:
        """Undo `hidden`."""
        return re.sub(f"{mark}(\\d+){mark}", lambda found: self.names[int(found[1])], text)

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield the text in pieces, in order: special tokens (True) and what stands between them (False)."""
        start = 0
        for found in () if self._pattern is None else self._pattern.finditer(text):
            if found.start() > start:
                yield text[start : found.start()], False
            yield found[0], True
            start = found.end()
        if start < len(text):
            yield text[start:], False


NO_SPECIALS = SpecialTokens(())


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Return what a record must not be able to write.

    These are the tokens that the tokenizer marks as special, and those that it does not mark although its chat template
    frames turns with them (`<｜User｜>`). Other added tokens are words of the vocabulary; so are tags that come in
    pairs (`<think>`, `</think>`), which an answer holds on purpose.
    """
    added = tuple(tokenizer.added_tokens_decoder.values())
    marked = {token.content for token in added if token.special} | set(map(str, tokenizer.all_special_tokens))
    return _special_tokens(
        frozenset(marked), frozenset(token.content for token in added), _template_text(tokenizer.chat_template)
    )


@lru_cache(maxsize=8)
def _special_tokens(marked: frozenset[str], added: frozenset[str], template: str) -> SpecialTokens:
    framing = {
        name
        for name in added - marked
        if name in template and _MARKUP.fullmatch(name) and not _has_partner(name, added)
    }
    return SpecialTokens(tuple(sorted(name for name in marked | framing if name)))


def _has_partner(name: str, added: frozenset[str]) -> bool:
    tag = _TAG.fullmatch(name)
    return tag is not None and {f"<{tag[1]}>", f"</{tag[1]}>"} <= added


def _template_text(template: object) -> str:
    if isinstance(template, dict):
        return "\n".join(map(str, cast("dict[str, object]", template).values()))
    return str(template or "")


def unused_mark(texts: Iterable[str]) -> str:
    """Return a private-use character that no text holds."""
    used: set[str] = set()
    for text in texts:
        used.update(text)
    return next(chr(code) for code in range(_FIRST_MARK, _LAST_MARK) if chr(code) not in used)
