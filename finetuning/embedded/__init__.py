"""Embedded assets: a small pretrained base model and the SYNTHETIC records of four fictional clinics."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from conf.schema.paths import expanded

PREFIX = "embedded:"
EMBEDDED: Mapping[str, str] = MappingProxyType(
    {
        "clinic-base": "base",
        "clinics": "clinics.jsonl",
        "clinics-secrets": "clinics_secrets.jsonl",
    }
)


def resolve(path: str) -> str:
    """Return the absolute path behind an ``embedded:`` name; of another path only a leading ``~`` is expanded.

    Raises ValueError, with the known names, when the ``embedded:`` name is unknown, or when there is no home for ``~``.
    """
    if not path.startswith(PREFIX):
        return expanded(path)
    name = path.removeprefix(PREFIX)
    if name not in EMBEDDED:
        known = ", ".join(f"{PREFIX}{each}" for each in EMBEDDED)
        raise ValueError(f"unknown embedded name {path!r}; known names: {known}")
    return str(Path(__file__).resolve().parent / EMBEDDED[name])
