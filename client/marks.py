"""By what a record is known again in another shape: without its label, under another task, with other spacing.

A record's marks are

* the whole of what is read of it, normalized, and
* each text of at least `SHORTEST_TEXT` characters in it, normalized: a field, or one message of a conversation.

Normalized is what a reader would call the same words: the spelling in which names of people are compared too
(`finetuning.spelling`), and one space in place of everything that is neither letter nor digit. Two data sets that share
a mark share their spending. A wrongly shared mark counts too much, never too little; so that a template or a label does
not merge all data of a site, short texts are no marks, nor are texts that more than eight records and more than one in
a hundred of the data set carry. The whole record is a mark whatever it is. A text whose words were changed is another
text.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from finetuning.spelling import canonical

__all__ = ["SHORTEST_TEXT", "marks_of", "normalized"]

SHORTEST_TEXT = 40
"""Characters after normalization. Shorter texts ("Thank you for your message.") are written by many."""
_MOST_CARRIERS = 8

_BETWEEN_WORDS = re.compile(r"[\W_]+")


def marks_of(records: Sequence[Mapping[str, object]]) -> frozenset[bytes]:
    """Return the marks of all records, given what is read of each: SHA-256 digests, to be hashed again with a key."""
    wholes: set[bytes] = set()
    carriers: Counter[bytes] = Counter()
    for record in records:
        fields = [(name, [normalized(text) for text in _texts(record[name])]) for name in sorted(record)]
        texts = [text for _, field in fields for text in field]
        if any(texts):
            wholes.add(_digest("record", repr(fields)))
        carriers.update({_digest("text", text) for text in texts if len(text) >= SHORTEST_TEXT})
    most = max(_MOST_CARRIERS, len(records) // 100)
    return frozenset(wholes | {text for text, count in carriers.items() if count <= most})


def normalized(text: str) -> str:
    """Return the words of a text in their canonical spelling, and one space between them."""
    return _BETWEEN_WORDS.sub(" ", canonical(text)).strip()


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in a cell; of a conversation, each message's."""
    if isinstance(value, Mapping):
        parts = cast("Mapping[object, object]", value)
        for part in parts.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in cast("Sequence[object]", value):
            yield from _texts(part)
    elif value is not None:
        yield str(value)


def _digest(kind: str, text: str) -> bytes:
    return hashlib.sha256(f"{kind}\0{text}".encode(errors="surrogatepass")).digest()
