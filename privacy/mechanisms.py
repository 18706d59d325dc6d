"""What was executed, as data: the accountant prices it, the ledger stores it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from protocol.errors import PrivacyError

__all__ = ["SubsampledGaussian", "Truncation", "gathered"]


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
            PrivacyError: when it is none; an unknown key is refused, because its cost would be too.
        """
        try:
            given = stored.get("truncation")
            parts: dict[str, Any] = {**stored, "truncation": None if given is None else Truncation(**given)}
            return cls(**parts)
        except TypeError as error:
            raise PrivacyError(f"the stored mechanism cannot be read: {error}") from error


def gathered(mechanisms: Iterable[SubsampledGaussian]) -> tuple[SubsampledGaussian, ...]:
    """Return one mechanism per set of parameters, with all of its steps, in order of appearance; none without steps."""
    steps: Counter[SubsampledGaussian] = Counter()
    for mechanism in mechanisms:
        steps[mechanism.repeated(0)] += mechanism.steps
    return tuple(mechanism.repeated(count) for mechanism, count in steps.items() if count)
