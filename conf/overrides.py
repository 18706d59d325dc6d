"""Reading the overrides of a command line with Hydra's parser, each beside what was typed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from conf.typed import (
    Choices,
    Entries,
    Items,
    Text,
    Typed,
    for_shell,
    in_quotes,
    one_line,
    scalars,
    scan,
    shown,
    written,
)

__all__ = ["Given", "key_typed_at", "quoted_at", "read_overrides", "sweep_lines", "text_typed_at", "typed_at"]

# Without the signs that mean something to Hydra, or may be a slip in a list or a quote; ~ alone is YAML's null.
_FOREIGN = re.compile(r"""(?!~$)[^=\\'"\[\]{}(),$\x00-\x1f]+""")
_PARSER = OverridesParser.create()


@dataclass(frozen=True)
class Given:
    """One override: what Hydra reads, and what was typed.

    Attributes:
        override: as Hydra reads it, after any quoting that its own grammar needs.
        typed: the argument, character for character.
        value: the parts of what stands behind the equals sign; None where there is none.
    """

    override: Override
    typed: str
    value: Typed | None

    @property
    def path(self) -> tuple[str, ...]:
        """The path that is set."""
        return tuple(self.override.key_or_group.split("."))

    @property
    def line(self) -> str:
        """What Hydra composes."""
        return self.override.input_line or ""

    @property
    def key(self) -> str:
        """What stands before the equals sign, prefixes included."""
        return self.typed.partition("=")[0]

    @property
    def told(self) -> str:
        """What was typed, on one line."""
        return one_line(self.typed)

    def as_text(self) -> str:
        """Return the argument that gives the whole value as a text, as a shell takes it."""
        return for_shell(f"{self.key}={in_quotes(self.typed.partition('=')[2])}")


def read_overrides(lines: Sequence[str]) -> tuple[list[Given], dict[tuple[str, ...], str]]:
    """Return the overrides that can be read, and for each that cannot the path that it would set and a sentence.

    One at a time: Hydra stops at the first and tells a position in its own grammar, not which override it was. A bare
    text of signs that its grammar does not know (`é`, `#`, `~/data`) is taken as it stands.
    """
    read, problems = list[Given](), dict[tuple[str, ...], str]()
    for number, line in enumerate(lines):
        given = _read(line)
        if given is None:
            problems[_path_of(line, number)] = _unreadable(line)
        elif changed := _changed_by_hydra(given):
            problems[given.path] = changed
        else:
            read.append(given)
    return read, problems


def sweep_lines(given: Given) -> list[str]:
    """Return one override per value of a sweep; the override alone where it is none.

    Raises:
        ValueError: the sweep cannot be enumerated.
    """
    override, value = given.override, given.value
    if not override.is_sweep_override() or value is None:
        return [given.typed]
    if isinstance(value, Choices):
        return [f"{given.key}={written(part, str)}" for part in value.parts]
    try:
        values = list(override.sweep_string_iterator())
    except HydraException as error:
        raise ValueError(f"{shown(given.typed)} cannot be swept over: {_one_line(error)}") from error
    if override.value_type == ValueType.RANGE_SWEEP:
        return [f"{given.key}={each}" for each in values]
    typed = {_as_hydra_writes(text.raw): text.raw for text in scalars(value)}
    return [f"{given.key}={typed.get(each, each)}" for each in values]


def text_typed_at(given: Sequence[Given], path: Sequence[str], value: Any) -> str | None:
    """Return the bare scalar that was typed for the value at a path; None where the value came from elsewhere."""
    for _, node in _nodes_at(given, path):
        return node.raw if isinstance(node, Text) and not node.quoted and _same(node.raw, value) else None
    return None


def key_typed_at(given: Sequence[Given], path: Sequence[str], key: Any) -> str | None:
    """Return what was typed for a key of the mapping at a path; None where it came from elsewhere."""
    keys = (raw for _, node in _nodes_at(given, path) if isinstance(node, Entries) for raw, _ in node.parts)
    return next((raw for raw in keys if _same(raw, key)), None)


def typed_at(given: Sequence[Given], path: Sequence[str]) -> str | None:
    """Return what was typed last for a path; None where nothing was."""
    return next((written(node, str) for _, node in _nodes_at(given, path)), None)


def quoted_at(given: Sequence[Given], path: Sequence[str]) -> str | None:
    """Return the argument that gives what was typed at a path as a text; None where nothing was typed."""
    for each, node in _nodes_at(given, path):
        assert each.value is not None
        whole = _replaced(each.value, path[len(each.path) :], Text(in_quotes(written(node, str))))
        return for_shell(f"{each.key}={written(whole, str)}")
    return None


def _nodes_at(given: Sequence[Given], path: Sequence[str]) -> Iterator[tuple[Given, Typed]]:
    """Return what the overrides hold at a path, the last one first."""
    for each in reversed(given):
        node = each.value
        if tuple(path[: len(each.path)]) != each.path:
            continue
        for part in path[len(each.path) :]:
            node = _inner(node, part)
        if node is not None:
            yield each, node


def _replaced(node: Typed, path: Sequence[str], new: Typed) -> Typed:
    if not path:
        return new
    inner = _inner(node, path[0])
    if isinstance(node, Entries):
        return Entries(tuple((k, _replaced(v, path[1:], new) if v is inner else v) for k, v in node.parts))
    assert isinstance(node, Items)
    return Items(tuple(_replaced(v, path[1:], new) if v is inner else v for v in node.parts))


def _inner(node: Typed | None, part: str) -> Typed | None:
    if isinstance(node, Entries):
        return next((inner for key, inner in node.parts if part in (key, str(_value_of(key)))), None)
    if isinstance(node, Items) and part.isdigit() and int(part) < len(node.parts):
        return node.parts[int(part)]
    return None


def _same(raw: str, value: Any) -> bool:
    read = _value_of(raw)
    return type(read) is type(value) and (read == value or repr(read) == repr(value))


def _value_of(raw: str) -> Any:
    override = _parsed(f"key={raw}")
    return None if override is None else override.value()


def _as_hydra_writes(raw: str) -> str:
    override = _parsed(f"key={raw}")
    return raw if override is None else override.get_value_element_as_str()


def _parsed(line: str) -> Override | None:
    try:
        override = _PARSER.parse_override(line)
    except HydraException:
        return None
    return override if override.key_or_group else None


def _read(line: str) -> Given | None:
    key, equals, value = line.partition("=")
    node = scan(value) if equals else None
    override = _parsed(line)
    if override is None and node is not None:
        override = _parsed(f"{key}={written(node, _quoted_if_foreign)}")
    return None if override is None else Given(override, line, node)


def _quoted_if_foreign(raw: str) -> str:
    return in_quotes(raw) if _FOREIGN.fullmatch(raw) and _parsed(f"key={raw}") is None else raw


def _quoted_if_unreadable(raw: str) -> str:
    return raw if raw and _parsed(f"key={raw}") else in_quotes(raw)


def _path_of(line: str, number: int) -> tuple[str, ...]:
    """Return the path that an override would set; one of its own where it has none."""
    key, equals, _ = line.partition("=")
    override = _parsed(f"{key}=x") if equals else None
    return tuple(override.key_or_group.split(".")) if override else (f"{number}: {line}",)


def _unreadable(line: str) -> str:
    key, equals, value = line.partition("=")
    example = "\"key='a, b'\""
    if equals and _parsed(f"{key}=x"):
        node = scan(value)
        parts = None if node is None or isinstance(node, Text) else f"{key}={written(node, _quoted_if_unreadable)}"
        example = for_shell(parts if parts and _parsed(parts) else f"{key}={in_quotes(value)}")
    return (
        f"{shown(line)} cannot be read as an override; write path.to.key=value, and quote a value that holds "
        f"brackets, braces, parentheses, quotes, commas or an equals sign: {example}"
        + ("; no value is null" if value.strip() == "~" else "")
    )


def _changed_by_hydra(given: Given) -> str | None:
    """Say which bare text Hydra would change: it drops spaces around a value and reads backslashes as its own."""
    typed = given.typed.partition("=")[2]
    bare = isinstance(given.value, Text) and not given.value.quoted and isinstance(given.override.value(), str)
    if bare and typed.strip(" \t") not in ("", typed):
        plain = f"{given.key}={typed.strip()}"
        return (
            f"{shown(given.typed)}: the spaces around the value would be dropped; write {for_shell(plain)}, or with "
            f"them {given.as_text()}"
        )
    for text in scalars(given.value) if given.value is not None else ():
        read = _value_of(text.raw)
        if not text.quoted and isinstance(read, str) and "\\" in text.raw and read != text.raw:
            kept, changed = (_with(given, text, in_quotes(each)) for each in (text.raw, read))
            return (
                f"{shown(given.typed)}: Hydra would read {text.raw} as {read}; quote the one that is meant: {kept} or "
                f"{changed}"
            )
    return None


def _with(given: Given, text: Text, instead: str) -> str:
    assert given.value is not None
    value = written(given.value, lambda raw: instead if raw == text.raw else raw)
    return for_shell(f"{given.key}={value}")


def _one_line(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
