"""Hydra overrides in, one validated `Experiment` out. Hydra and OmegaConf are used here and nowhere else.

Hydra only *composes* plain YAML; nothing is instantiated. Every problem is reported at once: unknown groups and group
members before composing, then every unknown key, bad value and broken rule by the frozen models.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError, create_model

from conf.schema.experiment import Experiment
from conf.schema.rules import broken_rules

__all__ = ["CONFIG_DIRECTORY", "InvalidConfiguration", "compose_experiment", "parse_experiment", "split_sweep"]

CONFIG_DIRECTORY = Path(__file__).resolve().parent


class InvalidConfiguration(ValueError):
    """The configuration cannot be used; `problems` holds one sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"the configuration has {len(self.problems)} problem(s):\n{lines}")


def compose_experiment(overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment that `conf/config.yaml` and `overrides` make up.

    Raises:
        InvalidConfiguration: naming each wrong path, its value, its bound and the nearest valid name.
    """
    parsed, problems = _parse(overrides)
    wrong = {id(override): problem for override in parsed if (problem := _unknown_group_member(override))}
    wrong |= {id(override): problem for override in parsed if (problem := _beside_its_package(override))}
    problems += wrong.values()
    usable = [override for override in parsed if id(override) not in wrong and not _chooses_nothing(override)]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIRECTORY)):
            composed = compose("config", overrides=list(_forgiving(usable)))
        tree = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise InvalidConfiguration([*problems, str(error).split("\nfull_key")[0]]) from error
    finally:
        GlobalHydra.instance().clear()
    if not isinstance(tree, dict):
        raise InvalidConfiguration(["conf/config.yaml does not hold a mapping"])
    tree.pop("experiment", None)  # the group is only a set of overrides; null when none was chosen
    return _validated(_without_blanks(tree), problems)


def parse_experiment(text: str | bytes) -> Experiment:
    """Return the experiment stored as JSON, for example in a run directory's `config.json`.

    Raises:
        InvalidConfiguration: when it is not JSON or does not validate.
    """
    try:
        return Experiment.model_validate_json(text)
    except ValidationError as error:
        raise InvalidConfiguration([_sentence(problem, {}) for problem in error.errors()]) from error


def split_sweep(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Return one tuple of overrides per job of a sweep: `a=1,2 b=3` gives `(a=1, b=3)` and `(a=2, b=3)`.

    Hydra's own sweep syntax, so `choice(...)`, `range(...)` and quoted values work as they do there.

    Raises:
        InvalidConfiguration: naming each override that cannot be read.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed, problems = _parse(overrides)
    if problems:
        raise InvalidConfiguration(problems)
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [tuple(job) for batch in batches for job in batch]


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Return the overrides that can be read, and a sentence for each that cannot.

    One at a time: Hydra stops at the first and tells a position in its own grammar, not which override it was.
    """
    parser, parsed, problems = OverridesParser.create(), list[Override](), list[str]()
    for line in overrides:
        try:
            override = parser.parse_override(_quoted_home(line))
        except HydraException:
            override = None
        if override is not None and override.key_or_group:
            parsed.append(override)
        else:
            problems.append(
                f"{line!r} cannot be read as an override; write path.to.key=value, and quote a value that holds "
                "brackets, braces, commas or an equals sign: \"key='a, b'\""
            )
    return parsed, problems


def _quoted_home(line: str) -> str:
    """Quote each value of `path=~/folder`: Hydra's grammar has no `~` in a value."""
    key, equals, value = line.partition("=")
    if not value.startswith("~") or any(mark in value for mark in "'\"\\[]{}()"):
        return line
    return key + equals + ",".join(f"'{part}'" if part.startswith("~") else part for part in value.split(","))


def _chooses_nothing(override: Override) -> bool:
    """Whether this is `experiment=null`: Hydra knows it in a file, and not on the command line."""
    return override.key_or_group == "experiment" and override.value() is None


def _unknown_group_member(override: Override) -> str | None:
    group, choice = override.key_or_group, override.value()
    members = _members(group)
    if override.is_delete() or not members or choice in members or _chooses_nothing(override):
        return None
    known = f"choose one of {', '.join(members)}"
    if isinstance(choice, str):
        return f"{group}={choice} does not exist; {known}{_nearest(choice, members)}"
    return (
        f"{override.input_line or group} names no member of the group {group}; {known}, and set its values one by one"
    )


def _members(group: str) -> list[str]:
    """Return the members of a group; none where it is no group."""
    return sorted(path.stem for path in (CONFIG_DIRECTORY / group.lstrip("/")).glob("*.yaml"))


def _beside_its_package(override: Override) -> str | None:
    """Say where the settings of a group are, when they are not below the group's own name."""
    group, dot, rest = override.key_or_group.partition(".")
    files = sorted((CONFIG_DIRECTORY / group).glob("*.yaml"))
    found = re.match(r"# @package (?!_global_)(\S+)", files[0].read_text()) if dot and files else None
    if found is None:
        return None
    line = override.input_line or override.key_or_group
    value = line.partition("=")[2]
    return f"{line} is no path: what {group}=NAME chooses is at {found[1]}; use {found[1]}.{rest}={value}"


def _forgiving(overrides: Iterable[Override]) -> Iterable[str]:
    """Let every value through to the models, which report all problems at once and name the nearest key.

    Hydra alone stops at the first unknown key. A new `kind` starts its node afresh: the keys of the variant that the
    YAML chose mean nothing to another one. Nodes are cleared before anything is set, the outer ones first, so a kind
    within a node of a new kind is no contradiction, and the order on the command line does not matter.
    """
    cleared, lines = set[str](), list[str]()
    for override in overrides:
        line = override.input_line or ""
        if _members(override.key_or_group) or override.is_delete() or override.is_add() or override.is_force_add():
            lines.append(line)
            continue
        value = override.value()
        parent, _, leaf = override.key_or_group.rpartition(".")
        if leaf == "kind" and parent:
            cleared.add(parent)
        elif isinstance(value, Mapping) and "kind" in value:
            cleared.add(override.key_or_group)
        lines.append(f"++{line}")
    for node in sorted(cleared, key=lambda path: path.count(".")):
        yield f"++{node}={{}}"  # Hydra deletes nothing that is not there
        yield f"~{node}"
    yield from lines


def _without_blanks(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    """Drop the values that YAML marks as the user's to give (`???`), so that the models report them as missing."""
    return {
        key: _without_blanks(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if value != "???"
    }


def _validated(tree: Mapping[Any, Any], problems: list[str]) -> Experiment:
    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        found = [line for item in error.errors() for line in _sentence(item, tree).split("\n")]
        raise InvalidConfiguration([*problems, *found, *_rules_of_valid_groups(tree, error)]) from error
    if problems:
        raise InvalidConfiguration(problems)
    return experiment


def _rules_of_valid_groups(tree: Mapping[Any, Any], error: ValidationError) -> list[str]:
    """Return the broken rules among the groups that are valid, so that one run of the program reports everything."""
    invalid = {str(problem["loc"][0]) for problem in error.errors() if problem["loc"]}
    if not invalid:
        return []  # the rules themselves are what failed
    groups = {
        name: _validated_group(name, tree[name])
        for name in Experiment.model_fields
        if name in tree and name not in invalid
    }
    return broken_rules(
        Experiment.model_construct(**groups), invalid | (Experiment.model_fields.keys() - groups.keys())
    )


def _validated_group(name: str, value: Any) -> Any:
    """Return one group of the experiment, known to be valid."""
    alone = create_model(
        name, group=(Experiment.model_fields[name].rebuild_annotation(), Experiment.model_fields[name])
    )
    return alone.model_validate({"group": value}).__dict__["group"]


def _sentence(problem: Any, tree: Mapping[Any, Any]) -> str:
    location = _without_tags(problem["loc"], tree)
    path = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"{path} is not a known key{_nearest_key(location, tree)}"
    if problem["type"] == "missing":
        return f"{path} is required and has no value; set {path}=..."
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        expected = problem.get("ctx", {}).get("expected_tags", "")
        given = problem.get("ctx", {}).get("tag", "nothing")
        return f"{path}.kind={given} does not exist; choose one of {expected}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not path:
        return message  # broken rules across groups, one a line
    return f"{path}={problem['input']!r}: {message[:1].lower()}{message[1:]}"


def _without_tags(location: Sequence[str | int], tree: Mapping[Any, Any]) -> list[str]:
    """Drop from a pydantic location the union tags, which are no part of the path a user writes."""
    path: list[str] = []
    node: Any = tree
    for part in location:
        if isinstance(node, Mapping) and part not in node and node.get("kind") == part:
            continue
        if part in ("tuple[str, ...]", "literal['auto']"):
            continue
        path.append(str(part))
        node = node.get(part) if isinstance(node, Mapping) else None
    return path


def _nearest_key(location: Sequence[str], tree: Mapping[Any, Any]) -> str:
    known = sorted(_fields_at(location[:-1], tree))
    return _nearest(location[-1], known) + (f"; known here: {', '.join(known)}" if known else "")


def _fields_at(location: Sequence[str], tree: Mapping[Any, Any]) -> set[str]:
    """Return the names of every field that can stand at a path, in the variants that the tree's `kind`s choose."""
    models: list[type[BaseModel]] = [Experiment]
    node: Any = tree
    for part in location:
        node = node.get(part) if isinstance(node, Mapping) else None
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


def _kind_of(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
