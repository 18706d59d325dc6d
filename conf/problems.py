"""What is wrong with a configuration, one sentence each: path, what was typed, bound, nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from conf.overrides import Given, quoted_at, typed_at
from conf.schema.experiment import Experiment
from conf.typed import for_shell, one_line, shown

__all__ = ["nearest", "path_of", "sentences"]

Path = tuple[str, ...]

_BRANCHES = ("tuple[str, ...]", "literal['auto']", "literal['auto','none']")
# What a wrong item does to the list that holds it, or to the other variants of a union: no problem of its own.
_CONSEQUENCES = ("too_short", "literal_error", "tuple_type")


def sentences(
    error: ValidationError, tree: Mapping[Any, Any], given: Sequence[Given] = (), told: Collection[Path] = ()
) -> list[str]:
    """Return one sentence per problem of a validation.

    Args:
        error: of the frozen models.
        tree: what was validated, for the variants that its `kind`s choose.
        given: the overrides, to show what was typed and how it is quoted.
        told: paths that have their sentence already.
    """
    found = dict[Path, list[Any]]()
    for problem in error.errors():
        found.setdefault(path_of(problem["loc"], tree), []).append(problem)
    lines = list[str]()
    for path, problems in found.items():
        unread = problems[0]["type"] == "missing" and any(path[: len(each)] == each for each in told)
        if unread or _follows(path, problems, found):
            continue
        lines += _sentence(path, problems, tree, given).split("\n")
    return lines


def path_of(location: Sequence[str | int], tree: Mapping[Any, Any]) -> Path:
    """Return the path that a user writes for a pydantic location: without the tags and branches of unions."""
    path, node, may_be_tag = list[str](), tree, False
    for part in location:
        if part in _BRANCHES or (may_be_tag and isinstance(node, Mapping) and node.get("kind") == part):
            may_be_tag = False  # a column may have the name of its kind: data.columns.text.text
            continue
        path.append(str(part))
        node, may_be_tag = _inner(node, part), True
    return tuple(path)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return what to add to a sentence about an unknown name; nothing where no known one is near."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _follows(path: Path, problems: Sequence[Any], found: Collection[Path]) -> bool:
    deeper = any(len(other) > len(path) and other[: len(path)] == path for other in found)
    return bool(path) and deeper and all(problem["type"] in _CONSEQUENCES for problem in problems)


def _sentence(location: Path, problems: Sequence[Any], tree: Mapping[Any, Any], given: Sequence[Given]) -> str:
    path, problem = ".".join(location), problems[0]
    if problem["type"] == "extra_forbidden":
        return f"{path} is not a known key{_nearest_key(location, tree)}"
    if problem["type"] == "missing":
        return f"{path} is required and has no value; set {path}=..."
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        expected = problem.get("ctx", {}).get("expected_tags", "")
        kind = typed_at(given, (*location, "kind")) or problem.get("ctx", {}).get("tag", "nothing")
        return f"{path}.kind={kind} does not exist; choose one of {expected}"
    if not path:
        return str(problem["msg"]).removeprefix("Value error, ")  # broken rules across groups, one a line
    typed = _typed(location, problem["input"], given)
    return f"{path}={typed}: {_messages(problems)}{_advice(location, problems, typed, given)}"


def _messages(problems: Sequence[Any]) -> str:
    """Return what each variant of a union wants, in one sentence."""
    texts = list(dict.fromkeys(str(problem["msg"]).removeprefix("Value error, ") for problem in problems))
    first, *others = [text[:1].lower() + text[1:].replace("a valid tuple", "a list") for text in texts]
    return " or ".join([first, *(text.removeprefix("input should be ") for text in others)])


def _typed(location: Path, value: Any, given: Sequence[Given]) -> str:
    if isinstance(value, str):
        return shown(value)
    plain = (
        {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    )
    return one_line(typed_at(given, location) or plain or repr(value))


def _advice(location: Path, problems: Sequence[Any], typed: str, given: Sequence[Given]) -> str:
    """Say how what was typed is written as the text or the list that is wanted here."""
    kinds = {problem["type"] for problem in problems}
    if "string_type" in kinds and (quoted := quoted_at(given, location)):
        return f"; as a text it needs quotes: {quoted}"
    if "tuple_type" in kinds and isinstance(problems[0]["input"], (str, int, float)):
        line = f"{'.'.join(location)}=[{typed_at(given, location) or typed}]"
        return f"; a list of one is {for_shell(line)}"
    return ""


def _nearest_key(location: Path, tree: Mapping[Any, Any]) -> str:
    known = sorted(_fields_at(location[:-1], tree))
    return nearest(location[-1], known) + (f"; known here: {', '.join(known)}" if known else "")


def _fields_at(location: Path, tree: Mapping[Any, Any]) -> set[str]:
    """Return the names of every field that can stand at a path, in the variants that the tree's `kind`s choose."""
    models: list[type[BaseModel]] = [Experiment]
    node: Any = tree
    for part in location:
        node = _inner(node, part)
        kind = node.get("kind") if isinstance(node, Mapping) else None
        inner = [
            variant
            for model in models
            if part in model.model_fields
            for variant in _models_in(model.model_fields[part].annotation)
        ]
        chosen = [variant for variant in inner if kind is not None and _kind_of(variant) == kind]
        models = chosen or inner
    return {name for model in models for name in model.model_fields}


def _inner(node: Any, part: str | int) -> Any:
    if isinstance(node, Mapping):
        return node.get(part)
    return node[part] if isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node) else None


def _kind_of(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
