"""What was executed, as data: the accountant prices it, the ledger stores it."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from protocol.errors import PrivacyError

__all__ = ["MOST_SLOTS", "MOST_STEPS", "SubsampledGaussian", "Truncation", "gathered"]

MOST_STEPS, MOST_SLOTS = 10**9, 10**12
"""In what is read from elsewhere: beyond any training and any data set, and within what accountants compute with."""


@dataclass(frozen=True, order=True)
class Truncation:
    """A draw larger than `cap` is cut to a uniformly random `cap` of the drawn slots."""

    slots: int
    cap: int

    def __post_init__(self) -> None:
        if not (self.slots >= 1 and self.cap >= 1):
            raise PrivacyError(f"{self} is no truncation: slots >= 1, cap >= 1")


@dataclass(frozen=True, order=True)
class SubsampledGaussian:
    """`steps` sums with Gaussian noise of `noise_multiplier` x sensitivity, on Poisson samples of `sampling_rate`.

    A single unsampled Gaussian, and correlated noise whose joint sensitivity is known, have rate 1 and one step.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    truncation: Truncation | None = None
    discrete: bool = False
    """Discrete Gaussian noise on integers instead of the continuous one."""

    def __post_init__(self) -> None:
        if not (0 < self.sampling_rate <= 1 and 0 <= self.noise_multiplier < math.inf and self.steps >= 0):
            raise PrivacyError(f"{self} is no mechanism: rate in (0, 1], noise >= 0, steps >= 0")

    def repeated(self, steps: int) -> SubsampledGaussian:
        """Return the same mechanism, executed for `steps` steps."""
        return replace(self, steps=steps)

    def to_json(self) -> dict[str, Any]:
        """Return the mechanism as JSON data; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> SubsampledGaussian:
        """Return the mechanism that `to_json` stored.

        Raises:
            PrivacyError: when it is none; an unknown key is refused, because its cost would be too, and so is a value
                of another type or beyond `MOST_STEPS` and `MOST_SLOTS`, which no accountant could price.
        """
        try:
            _check_types(stored)
            given = stored.get("truncation")
            parts: dict[str, Any] = {**stored, "truncation": None if given is None else Truncation(**given)}
            return cls(**parts)
        except TypeError as error:
            raise PrivacyError(f"the stored mechanism cannot be read: {error}") from error


def _check_types(stored: Mapping[str, Any]) -> None:
    """Raise a TypeError where a value that is there is of another type than its field, or too large."""
    for name in ("sampling_rate", "noise_multiplier"):
        value = stored.get(name, 0)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise TypeError(f"{name}={_short(value)}, expected a finite number")
    cut = stored.get("truncation")
    if cut is not None and not isinstance(cut, Mapping):
        raise TypeError(f"truncation={_short(cut)}, expected slots and cap")
    _check_count("steps", stored.get("steps", 0), MOST_STEPS)
    for name, value in (cut or {}).items():  # pyright: ignore[reportUnknownVariableType]
        _check_count(f"truncation.{name}", value, MOST_SLOTS)
    if type(stored.get("discrete", False)) is not bool:
        raise TypeError(f"discrete={_short(stored['discrete'])}, expected true or false")


def _check_count(name: str, value: Any, most: int) -> None:
    if type(value) is not int or not abs(value) <= most:
        raise TypeError(f"{name}={_short(value)}, expected a whole number of at most {most:.0e}")


def _short(value: Any) -> str:
    """Return a value for a message; Python refuses to write out integers of thousands of digits."""
    return "an integer beyond 2^200" if type(value) is int and value.bit_length() > 200 else repr(value)[:40]


def gathered(mechanisms: Iterable[SubsampledGaussian]) -> tuple[SubsampledGaussian, ...]:
    """Return one mechanism per set of parameters, with all of its steps, in order of appearance; none without steps."""
    steps: Counter[SubsampledGaussian] = Counter()
    for mechanism in mechanisms:
        steps[mechanism.repeated(0)] += mechanism.steps
    return tuple(mechanism.repeated(count) for mechanism, count in steps.items() if count)
