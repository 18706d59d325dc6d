"""The strict mode: units' gradients as integers, summed exactly, with discrete Gaussian noise sampled exactly.

No floating-point number takes part between a unit's rounded row and the noised sum, so nothing that was proven for
integers has to be assumed for floats. Sampling follows Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), the use for
sums of rounded vectors Kairouz, Liu and Steinke 2021 (arXiv 2102.06387).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from privacy.randomness import SecureStream
from protocol.errors import PrivacyError

__all__ = ["MAX_SCALE", "DiscreteNoise", "discrete_gaussian"]

MAX_SCALE = 1 << 25
"""The largest standard deviation, in grid steps, for which all of the sampler's integers fit into 64 bits."""

_FINEST_SCALE = MAX_SCALE // 2
# Grid steps per unit of sensitivity and √dimension: rounding then costs at most 1 / 256 of the clip norm.
_STEPS_PER_ROOT = 128
# How far a norm that was computed in floating point may lie below the true one.
_NORM_ERROR = 2.0**-12
_BLOCK = 1 << 15
_WORD = 1 << 64


@dataclass(frozen=True)
class DiscreteNoise:
    """Rounds each unit's row to a grid, sums integers, and adds discrete Gaussian noise to every coordinate.

    `dimension` counts all coordinates of all parameters. With `granularity` g, a row that is clipped to `clip_norm` has
    at most the norm `sensitivity` / g after rounding, as an integer vector; the noise has the parameter `scale`, at
    least multiplier x sensitivity / g. One release is ½ / multiplier² zCDP (arXiv 2004.00010, theorem 4; coordinates
    add up). Rounding to the nearest grid point loses entries below g / 2, about 1/256 of a typical entry.
    """

    multiplier: float
    sensitivity: float
    dimension: int

    def __post_init__(self) -> None:
        if not (0 < self.multiplier < math.inf and 0 < self.sensitivity < math.inf and self.dimension >= 1):
            raise PrivacyError(f"{self} is no noise: multiplier and sensitivity must be positive, dimension at least 1")
        if self.clip_norm <= 0:
            raise PrivacyError(
                f"{self}: rounding to the grid of {self.granularity:.3g} costs more than the sensitivity; lower the "
                "multiplier or train fewer parameters"
            )

    @property
    def granularity(self) -> float:
        """The grid's spacing g in gradient units, a power of two.

        Rounding costs √dimension · g / 2 of the clip norm: at most 1/256 of the sensitivity, or
        multiplier · √dimension / 2^24 where that is more, because the sampler's integers bound g from below. The latter
        exceeds 1 % only for multipliers above 160 at a million coordinates, above 26 at 40 million.
        """
        for_rounding = 2.0 ** math.floor(math.log2(self.sensitivity / (_STEPS_PER_ROOT * math.sqrt(self.dimension))))
        for_sampling = 2.0 ** math.ceil(math.log2(self.multiplier * self.sensitivity / _FINEST_SCALE))
        return max(for_rounding, for_sampling)

    @property
    def scale(self) -> int:
        """The noise's parameter in grid steps: its standard deviation, rounded up to an integer."""
        return math.ceil(self.multiplier * self.sensitivity / self.granularity)

    @property
    def standard_deviation(self) -> float:
        """The noise's standard deviation per coordinate, in gradient units."""
        return self.scale * self.granularity

    @property
    def clip_norm(self) -> float:
        """What rows are clipped to: the sensitivity, less the worst that rounding adds to a row's norm.

        Norms and factors are computed in floating point; a relative error of up to 2^-12 is allowed for.
        """
        return (self.sensitivity - self.granularity * math.sqrt(self.dimension) / 2) * (1 - _NORM_ERROR)

    def zeros(self, like: torch.Tensor) -> torch.Tensor:
        """Return an empty int64 sum with the shape and device of `like`."""
        return torch.zeros_like(like, dtype=torch.int64)

    def fold(self, rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return the int64 sum, shape (n,), of the rows after factor and rounding, in grid steps.

        Raises:
            PrivacyError: an entry above the sensitivity, or none at all (NaN): the rows were not clipped.
        """
        steps = rows.to(torch.float64) * (factors.to(torch.float64) / self.granularity)[:, None]
        if not bool((steps.abs() <= self.sensitivity / self.granularity).all()):
            raise PrivacyError(
                f"a row has an entry above the sensitivity of {self.sensitivity:g}, or NaN: "
                f"clip rows to clip_norm={self.clip_norm:g}"
            )
        # No overflow: an entry has at most 256 · √dimension < 2^31 steps, so 2^32 units fit into 63 bits.
        return steps.round_().to(torch.int64).sum(dim=0)

    def draw(self, like: Sequence[torch.Tensor], stream: SecureStream) -> tuple[torch.Tensor, ...]:
        """Return int64 noise in grid steps, with the shapes of `like`."""
        return tuple(
            torch.from_numpy(discrete_gaussian(self.scale, one.numel(), stream)).reshape(one.shape) for one in like
        )

    def add_drawn(self, sums: Sequence[torch.Tensor], drawn: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return (sum + noise) · g in float32: integers are added, what follows is post-processing."""
        return tuple(self._noised(value, noise) for value, noise in zip(sums, drawn, strict=True))

    def add(self, sums: Sequence[torch.Tensor], stream: SecureStream) -> tuple[torch.Tensor, ...]:
        """Return float32 sums with fresh noise, in gradient units.

        Raises:
            PrivacyError: sums that are no integers, so not made by `zeros` and `fold`.
        """
        return self.add_drawn(sums, self.draw(sums, stream))

    def _noised(self, value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if value.dtype != torch.int64:
            raise PrivacyError(f"a sum of {value.dtype} is not counted in grid steps: make it with zeros and fold")
        noised = noise.to(value.device).add_(value)
        return noised.to(torch.float64).mul_(self.granularity).to(torch.float32)


def discrete_gaussian(scale: int, count: int, stream: SecureStream) -> np.ndarray:
    """Return `count` int64 values with P(x) proportional to exp(-x² / (2 · scale²)), sampled exactly.

    Rejection from the discrete Laplace distribution (arXiv 2004.00010, algorithm 3, with t = σ). Every decision
    compares a uniform integer with an integer; no floating-point number is used.

    Raises:
        PrivacyError: a scale outside [1, MAX_SCALE].
    """
    if not 1 <= scale <= MAX_SCALE:
        raise PrivacyError(f"the discrete Gaussian's scale is {scale}, it must lie in [1, {MAX_SCALE}]")
    values = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        proposed = _discrete_laplace(scale, _BLOCK, stream)
        # Accept with exp(-(|y| - σ)² / (2 σ²)). Below 2^63 unless |y| > 90 σ, which has probability e^-90.
        excess = np.square(np.abs(proposed) - scale)
        accepted = proposed[_bernoulli_exp(excess, 2 * scale * scale, stream)][: count - filled]
        values[filled : filled + len(accepted)] = accepted
        filled += len(accepted)
    return values


def _discrete_laplace(scale: int, tries: int, stream: SecureStream) -> np.ndarray:
    """Return up to `tries` values with P(x) proportional to exp(-|x| / scale) (algorithm 2); the rest were rejected."""
    remainder = _below(scale, tries, stream)
    remainder = remainder[_bernoulli_exp_fraction(remainder, scale, stream)]
    magnitude = remainder + scale * _geometric(len(remainder), stream)
    negative = stream.words(len(magnitude)) >> np.uint64(63) == 1
    # Zero has two signs, of which one is rejected.
    kept = ~(negative & (magnitude == 0))
    return np.where(negative, -magnitude, magnitude)[kept]


def _geometric(count: int, stream: SecureStream) -> np.ndarray:
    """Return how often exp(-1) came true before it first failed."""
    successes = np.zeros(count, dtype=np.int64)
    going = np.arange(count)
    while len(going):
        going = going[_bernoulli_exp_fraction(np.ones(len(going), dtype=np.int64), 1, stream)]
        successes[going] += 1
    return successes


def _bernoulli_exp(numerators: np.ndarray, denominator: int, stream: SecureStream) -> np.ndarray:
    """Return Booleans that are true with probability exp(-numerator / denominator) (algorithm 1), whatever its size."""
    whole, rest = np.divmod(numerators, denominator)
    outcome = _bernoulli_exp_fraction(rest, denominator, stream)
    # exp(-n) is true when exp(-1) is, n times in a row.
    large = np.flatnonzero(outcome & (whole > 0))
    outcome[large] = _geometric(len(large), stream) >= whole[large]
    return outcome


def _bernoulli_exp_fraction(numerators: np.ndarray, denominator: int, stream: SecureStream) -> np.ndarray:
    """Return Booleans that are true with probability exp(-numerator / denominator), for fractions in [0, 1].

    Von Neumann's series (algorithm 1): trials of γ/1, γ/2, γ/3 … until one fails; true when their number is odd.
    """
    outcome = np.zeros(len(numerators), dtype=bool)
    going = np.arange(len(numerators))
    trial = 1
    while len(going):
        # trial · denominator stays below 2^63: trial 4096 is reached with probability 1 / 4095!.
        succeeded = _below(trial * denominator, len(going), stream) < numerators[going]
        outcome[going[~succeeded]] = trial % 2 == 1
        going = going[succeeded]
        trial += 1
    return outcome


def _below(bound: int, count: int, stream: SecureStream) -> np.ndarray:
    """Return `count` int64 values, uniform below `bound` < 2^63.

    Words at or above the largest multiple of `bound` are drawn again, so no remainder is favored.
    """
    words = stream.words(count)
    limit = _WORD - _WORD % bound
    if limit < _WORD:
        words = words.copy()
        while len(again := np.flatnonzero(words >= np.uint64(limit))):
            words[again] = stream.words(len(again))
    return (words % np.uint64(bound)).astype(np.int64)
