"""YAML as YAML 1.2 reads it: `no` is a text, and so are 2024_11_30, 18:00, 0x10, 010 and a date."""

from __future__ import annotations

import re
from typing import Any

import yaml
from pydantic import ValidationError

__all__ = ["problems_of", "read_yaml"]


class _Plain(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars that YAML 1.2 and the models agree on; all others are texts."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


_Plain.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Plain.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Plain.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Plain.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:0|[1-9][0-9]*)?(?:\.[0-9]*)(?<!^\.)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
_Plain.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])


def read_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, Loader=_Plain)


def problems_of(error: ValidationError) -> list[str]:
    """Return one line per problem: the path, what is wanted, and how a number or a word is written as a text.

    No text is shown: a ledger's address may hold a password.
    """
    return [f"{'.'.join(map(str, item['loc']))}: {item['msg']}{_quotes(item)}" for item in error.errors()]


def _quotes(item: Any) -> str:
    value = item["input"]
    if item["type"] != "string_type" or not (value is None or isinstance(value, (bool, int, float))):
        return ""
    text = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else value
    return f"; {text} needs quotes to be one"
