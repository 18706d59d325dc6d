"""What an entry of each kind must say: checked before anything reads it, so that no entry is half understood."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from privacy.mechanisms import SubsampledGaussian
from protocol.errors import PrivacyError

__all__ = ["payload_problem"]

_Check = Callable[[Any], bool]


def payload_problem(kind: str, payload: str) -> str | None:
    """Return what is wrong with the payload of an entry of `kind`; None when it can be read."""
    checks = _KINDS.get(kind)
    if checks is None:
        return f"the kind {kind!r} is none of {', '.join(_KINDS)}"
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError) as error:
        return f"its payload is no JSON: {error}"
    if not isinstance(content, dict):
        return "its payload is no JSON object"
    return _problem(content, checks)  # pyright: ignore[reportUnknownArgumentType]


def _problem(content: Mapping[str, Any], checks: Mapping[str, _Check]) -> str | None:
    for name, is_right in checks.items():
        if name not in content:
            return f"{name!r} is missing"
        if not is_right(content[name]):
            return f"{name!r} is {json.dumps(content[name])[:60]}, which cannot be"
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_epsilon(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _is_limit(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _is_delta(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1


def _is_mechanism(value: Any) -> bool:
    try:
        SubsampledGaussian.from_json(value)
    except (PrivacyError, TypeError, AttributeError):
        return False
    cut = value.get("truncation")
    return (
        all(_is_number(value[name]) for name in ("sampling_rate", "noise_multiplier"))
        and _is_count(value["steps"])
        and isinstance(value.get("discrete", False), bool)
        and (cut is None or all(map(_is_count, cut.values())))
    )


def _is_budget(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == _LIMITS.keys() and _problem(value, _LIMITS) is None  # pyright: ignore[reportUnknownArgumentType]


_LIMITS: Mapping[str, _Check] = {
    "epsilon": _is_limit,
    "delta": _is_delta,
    "unit": lambda value: _is_text(value) and bool(value),
}
_KINDS: Mapping[str, Mapping[str, _Check]] = {
    "budget": {**_LIMITS, "reason": _is_text},
    "schedule": {"run": _is_text, "plan_digest": _is_text, "mechanism": _is_mechanism},
    "reserve": {
        "run": _is_text,
        "round": _is_count,
        "plan_digest": _is_text,
        "mechanism": _is_mechanism,
        "inputs_digest": _is_text,
        "attempt": _is_count,
        "epsilon_after": _is_epsilon,
        "rule": _is_text,
        "budget": _is_budget,
    },
    "commit": {"reserve": _is_count, "attempt": _is_count, "output_digest": _is_text},
}
