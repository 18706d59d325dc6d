"""The value of an override as it was typed: its parts, character for character, and how each is quoted.

Hydra's parser keeps what it made of a value: `2024_11_30` is the number 20241130 from there on. What was typed is kept
here, so that a text can be taken as it stands, and an error can show it. No Hydra here: this is text in, text out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "Call",
    "Choices",
    "Entries",
    "Items",
    "Text",
    "Typed",
    "for_shell",
    "in_quotes",
    "one_line",
    "scalars",
    "scan",
    "shown",
    "written",
]

_ESCAPED = re.compile(r"\\[\\()\[\]{}:=, \t]")
_QUOTED = re.compile(r"""'(?:(?:\\\\)*|.*?[^\\](?:\\\\)*)'|"(?:(?:\\\\)*|.*?[^\\](?:\\\\)*)\"""", re.DOTALL)
_CALL = re.compile(r"([A-Za-z_][\w-]*)[ \t]*\(", re.ASCII)
_BACKSLASH, _APOSTROPHE, _ESCAPES = "\\", "'", {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_INTERPOLATION = re.compile(r"\$\{[^}]+\}")


@dataclass(frozen=True)
class Text:
    """A scalar: `raw` is what stands there, quotes included."""

    raw: str

    @property
    def quoted(self) -> bool:
        """Whether it stands in quotes, so that it is a text whatever it holds."""
        return self.raw[:1] in ("'", '"')


@dataclass(frozen=True)
class Items:
    """A list, `[a,b]`."""

    parts: tuple[Typed, ...]


@dataclass(frozen=True)
class Entries:
    """A mapping, `{a:1,b:2}`; keys as they stand there."""

    parts: tuple[tuple[str, Typed], ...]


@dataclass(frozen=True)
class Call:
    """A function of Hydra, `choice(a,b)`."""

    name: str
    parts: tuple[Typed, ...]


@dataclass(frozen=True)
class Choices:
    """The values of a sweep, `a,b`."""

    parts: tuple[Typed, ...]


Typed: TypeAlias = Text | Items | Entries | Call | Choices


class _Unbalanced(Exception):
    """A bracket or a quote that is not closed, or one within a bare text."""


def scan(value: str) -> Typed | None:
    """Return the parts of what stands behind the equals sign; None where brackets or quotes do not close."""
    try:
        reader = _Reader(value)
        parts = tuple(reader.until(""))
    except _Unbalanced:
        return None
    return parts[0] if len(parts) == 1 else Choices(parts)


def written(node: Typed, change: Callable[[str], str]) -> str:
    """Return a value as it would be typed, with each scalar that stands without quotes passed through `change`."""
    match node:
        case Text(raw):
            return raw if node.quoted else change(raw)
        case Items(parts):
            return f"[{','.join(written(part, change) for part in parts)}]"
        case Entries(parts):
            return "{" + ",".join(f"{key}:{written(part, change)}" for key, part in parts) + "}"
        case Call(name, parts):
            return f"{name}({','.join(written(part, change) for part in parts)})"
        case Choices(parts):
            return ",".join(written(part, change) for part in parts)


def scalars(node: Typed) -> Iterator[Text]:
    """Return every scalar of a value, keys excepted."""
    if isinstance(node, Text):
        yield node
    elif isinstance(node, Entries):
        for _, part in node.parts:
            yield from scalars(part)
    else:
        for part in node.parts:
            yield from scalars(part)


def in_quotes(text: str) -> str:
    """Return a text in the quotes that make Hydra and OmegaConf read exactly this text."""
    # A backslash counts for OmegaConf before ${ alone, and for Hydra before the quote and at the end alone.
    literal = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    quote = '"' if re.search(r"['$`\\!]", text) and '"' not in text else "'"  # what a shell takes with least signs
    inner = re.sub(rf"(\\*){quote}", lambda found: found[1] * 2 + "\\" + quote, literal)
    ending = len(inner) - len(inner.rstrip("\\"))
    return quote + inner + "\\" * ending + quote


def for_shell(line: str) -> str:
    """Return an argument as it is typed at bash or zsh, in double quotes where these change nothing in it."""
    if not line.isprintable():
        return f"$'{one_line(line.replace(_BACKSLASH, _BACKSLASH * 2).replace(_APOSTROPHE, _BACKSLASH + _APOSTROPHE))}'"
    return f'"{line}"' if not re.search(r'["$`\\!]', line) else shlex.quote(line)


def one_line(text: str) -> str:
    """Return a text with an escape for each character that cannot be printed."""
    return "".join(char if char.isprintable() else _ESCAPES.get(char, f"\\U{ord(char):08x}") for char in text)


def shown(text: str) -> str:
    """Return what was typed, in quotes and on one line."""
    plain = one_line(text)
    quote = '"' if "'" in plain and '"' not in plain else "'"
    return f"{quote}{plain}{quote}"


class _Reader:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def until(self, end: str) -> Iterator[Typed]:
        """Read elements between commas up to `end`, which is taken too; the empty `end` is the end of the text."""
        if self._ends(end):
            if not end:
                yield Text("")
            return
        while True:
            yield self._element(end)
            if self._ends(end):
                return
            self._take(",")

    def _ends(self, end: str) -> bool:
        self._space()
        if not end:
            return self._at == len(self._text)
        if self._text.startswith(end, self._at):
            self._at += 1
            return True
        return False

    def _element(self, end: str) -> Typed:
        self._space()
        first = self._text[self._at : self._at + 1]
        if first == "[":
            self._at += 1
            return Items(tuple(self.until("]")))
        if first == "{":
            self._at += 1
            return Entries(tuple(self._entries()))
        if quoted := _QUOTED.match(self._text, self._at):
            self._at = quoted.end()
            return Text(quoted[0])
        if call := _CALL.match(self._text, self._at):
            self._at = call.end()
            return Call(call[1], tuple(self.until(")")))
        return Text(self._bare(end))

    def _entries(self) -> Iterator[tuple[str, Typed]]:
        if self._ends("}"):
            return
        while True:
            key = self._bare(":")
            self._take(":")
            yield key, self._element("}")
            if self._ends("}"):
                return
            self._take(",")

    def _bare(self, end: str) -> str:
        self._space()
        start = self._at
        while self._at < len(self._text):
            whole = _INTERPOLATION.match(self._text, self._at) or _ESCAPED.match(self._text, self._at)
            char = self._text[self._at]
            if whole is None and (char == "," or char == end):
                break
            if whole is None and char in "[]{}()'\"":
                raise _Unbalanced
            self._at = whole.end() if whole else self._at + 1
        return self._text[start : self._at].strip(" \t")

    def _space(self) -> None:
        while self._text[self._at : self._at + 1] in (" ", "\t"):
            self._at += 1

    def _take(self, char: str) -> None:
        if not self._text.startswith(char, self._at):
            raise _Unbalanced
        self._at += 1
