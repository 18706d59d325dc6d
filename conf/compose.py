"""Hydra overrides in, one validated `Experiment` out. Only conf.overrides uses Hydra too.

Hydra only *composes* plain YAML; nothing is instantiated. Every problem is reported at once: unknown groups and group
members before composing, then every unknown key, bad value and broken rule by the frozen models.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError, create_model

from conf.overrides import Given, key_typed_at, quoted_at, read_overrides, sweep_lines, text_typed_at
from conf.own_model import settings_for
from conf.problems import nearest, path_of, sentences
from conf.schema.experiment import Experiment
from conf.schema.rules import broken_rules
from conf.typed import Choices, for_shell

__all__ = [
    "CONFIG_DIRECTORY",
    "InvalidConfiguration",
    "chosen_settings",
    "compose_experiment",
    "parse_experiment",
    "split_sweep",
]

CONFIG_DIRECTORY = Path(__file__).resolve().parent


class InvalidConfiguration(ValueError):
    """The configuration cannot be used; `problems` holds one sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"the configuration has {len(self.problems)} problem(s):\n{lines}")


def compose_experiment(overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment that `conf/config.yaml` and `overrides` make up.

    A text is taken as it was typed: `name=2024_11_30` is that name, though YAML reads a number.

    Raises:
        InvalidConfiguration: naming each wrong path, what was typed, its bound and the nearest valid name.
    """
    given, problems = read_overrides(overrides)
    given = [*read_overrides(settings_for(_plainly(given)))[0], *given]
    wrong = {id(each): problem for each in given if (problem := _unusable(each))}
    problems |= {each.path: wrong[id(each)] for each in given if id(each) in wrong}
    usable = [each for each in given if id(each) not in wrong and not _chooses_nothing(each.override)]
    tree = _without_broken_references(usable, problems)
    tree.pop("experiment", None)  # the group is only a set of overrides; null when none was chosen
    return _validated(_without_blanks(tree), usable, problems)


def chosen_settings(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return what `compose_experiment` sets before `overrides`, as overrides: a model of one's own has its settings."""
    return settings_for(_plainly(read_overrides(overrides)[0]))


def parse_experiment(text: str | bytes) -> Experiment:
    """Return the experiment stored as JSON, for example in a run directory's `config.json`.

    Raises:
        InvalidConfiguration: when it is not JSON or does not validate.
    """
    try:
        return Experiment.model_validate_json(text)
    except ValidationError as error:
        raise InvalidConfiguration(sentences(error, {})) from error


def split_sweep(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Return one tuple of overrides per job of a sweep: `a=1,2 b=3` gives `(a=1, b=3)` and `(a=2, b=3)`.

    Hydra's own sweep syntax, so `choice(...)`, `range(...)` and quoted values work as they do there.

    Raises:
        InvalidConfiguration: naming each override that cannot be read.
    """
    given, unread = read_overrides(overrides)
    problems, values = list(unread.values()), dict[str, list[str]]()
    for each in given:
        try:
            values[each.override.get_key_element()] = sweep_lines(each)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise InvalidConfiguration(problems)
    return list(itertools.product(*values.values()))


def _plainly(given: Sequence[Given]) -> list[tuple[str, str]]:
    """Return path and value of each override, without quotes."""
    return [(each.override.key_or_group, each.typed.partition("=")[2].strip("'\"")) for each in given]


def _unusable(given: Given) -> str | None:
    """Say what is wrong with one override alone."""
    override = given.override
    if override.is_sweep_override():
        return _sweep_of_one(given)
    if override.value() == "???":
        return f"{given.told} marks a value that is yet to be given; give one, or leave this out"
    return _unknown_group_member(given) or _beside_its_package(given)


def _sweep_of_one(given: Given) -> str:
    text = f"{given.told} names several values; to run each, add -m to cloister simulate"
    if _members(given.override.key_or_group) or not isinstance(given.value, Choices):
        return text
    bracketed = for_shell(f"{given.key}=[{given.typed.partition('=')[2]}]")
    return f"{text}; a list is {bracketed}, one text {given.as_text()}"


def _chooses_nothing(override: Override) -> bool:
    """Whether this is `experiment=null`: Hydra knows it in a file, and not on the command line."""
    return override.key_or_group == "experiment" and override.value() is None


def _unknown_group_member(given: Given) -> str | None:
    group, choice = given.override.key_or_group, given.override.value()
    members = _members(group)
    if given.override.is_delete() or not members or choice in members or _chooses_nothing(given.override):
        return None
    known = f"choose one of {', '.join(members)}"
    if isinstance(choice, str):
        return f"{group}={choice} does not exist; {known}{nearest(choice, members)}"
    return f"{given.told} names no member of the group {group}; {known}, and set its values one by one"


def _members(group: str) -> list[str]:
    """Return the members of a group; none where it is no group."""
    return sorted(path.stem for path in (CONFIG_DIRECTORY / group.lstrip("/")).glob("*.yaml"))


def _beside_its_package(given: Given) -> str | None:
    """Say where the settings of a group are, when they are not below the group's own name."""
    group, dot, rest = given.override.key_or_group.partition(".")
    files = sorted((CONFIG_DIRECTORY / group).glob("*.yaml"))
    found = re.match(r"# @package (?!_global_)(\S+)", files[0].read_text()) if dot and files else None
    if found is None:
        return None
    value = given.typed.partition("=")[2]
    return f"{given.told} is no path: what {group}=NAME chooses is at {found[1]}; use {found[1]}.{rest}={value}"


def _without_broken_references(usable: list[Given], problems: dict[tuple[str, ...], str]) -> dict[Any, Any]:
    """Compose, without the overrides that refer to what is not there; each is a problem and leaves `usable`."""
    while True:
        try:
            return _composed(usable)
        except OmegaConfBaseException as error:
            path = tuple(re.split(r"[.\[\]]+", (error.full_key or "").rstrip("]")))
            wrong = next((each for each in reversed(usable) if path[: len(each.path)] == each.path), None)
            if wrong is None:
                raise InvalidConfiguration([*problems.values(), _one_line(error, usable)]) from error
            reason = str(error).splitlines()[0]
            problems[wrong.path] = f"{wrong.told}: {reason}; for the text itself write {quoted_at([wrong], path)}"
            usable.remove(wrong)
        except HydraException as error:
            raise InvalidConfiguration([*problems.values(), _one_line(error, usable)]) from error


def _composed(usable: Sequence[Given]) -> dict[Any, Any]:
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIRECTORY)):
            composed = compose("config", overrides=list(_forgiving(each.override for each in usable)))
        tree = OmegaConf.to_container(composed, resolve=True)
    finally:
        GlobalHydra.instance().clear()
    if not isinstance(tree, dict):
        raise InvalidConfiguration(["conf/config.yaml does not hold a mapping"])
    return tree


def _one_line(error: Exception, usable: Sequence[Given]) -> str:
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    for each in usable:
        text = text.replace(f"++{each.line}", each.typed)
    return text


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


def _validated(tree: dict[Any, Any], given: Sequence[Given], problems: Mapping[tuple[str, ...], str]) -> Experiment:
    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        texts = _with_texts_as_typed(tree, error, given)
        if texts != tree:
            return _validated(texts, given, problems)
        found = sentences(error, tree, given, problems)
        raise InvalidConfiguration([*problems.values(), *found, *_rules_of_valid_groups(tree, error)]) from error
    found = [*problems.values(), *_numbers_from_booleans(tree, experiment.model_dump())]
    if found:
        raise InvalidConfiguration(found)
    return experiment


def _with_texts_as_typed(tree: dict[Any, Any], error: ValidationError, given: Sequence[Given]) -> dict[Any, Any]:
    """Return the tree with what was typed wherever a text is wanted and YAML made a number of it."""
    changed = deepcopy(tree)
    for problem in error.errors():
        value, path = problem["input"], path_of(problem["loc"], tree)
        if problem["type"] != "string_type" or not isinstance(value, (bool, int, float)):
            continue
        if path[-1] == "[key]":
            inside = _at(changed, path[:-2])
            inside[key_typed_at(given, path[:-2], value) or value] = inside.pop(value)
        elif (typed := text_typed_at(given, path, value)) is not None:
            inside = _at(changed, path[:-1])
            inside[int(path[-1]) if isinstance(inside, list) else path[-1]] = typed
    return changed


def _at(tree: Any, path: Sequence[str]) -> Any:
    for part in path:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def _numbers_from_booleans(tree: Any, dumped: Any, path: str = "") -> list[str]:
    """Say where true or false stands for a number: Python would read 1 or 0."""
    if isinstance(tree, bool) and isinstance(dumped, (int, float)) and not isinstance(dumped, bool):
        return [f"{path}={str(tree).lower()}: input should be a number, not true or false"]
    if isinstance(tree, Mapping) and isinstance(dumped, Mapping):
        pairs = [(f"{path}.{key}" if path else str(key), tree[key], dumped.get(key)) for key in tree]
    elif isinstance(tree, list) and isinstance(dumped, tuple):
        pairs = [(f"{path}.{at}", *pair) for at, pair in enumerate(zip(tree, dumped, strict=True))]
    else:
        return []
    return [line for inner, left, right in pairs for line in _numbers_from_booleans(left, right, inner)]


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
