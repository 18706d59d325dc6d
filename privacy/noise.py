"""Noise on sums: the interface, Gaussian noise on a lattice, and drawing it ahead of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from privacy.clipping import weighted_sum
from privacy.randomness import SecureStream
from protocol.errors import PrivacyError

__all__ = ["GaussianNoise", "Noise", "NoiseAhead"]

_LATTICE_BITS = 18


class Noise(Protocol):
    """How units' gradients are summed, and which noise the sum gets.

    One parameter at a time: `total = zeros(parameter)`, then `total += fold(rows, factors).view_as(total)` for every
    micro-batch, then `add` for all parameters together. No unit's row, over all parameters, may be longer than
    `clip_norm` after its factor.
    """

    @property
    def clip_norm(self) -> float:
        """The L2 norm that a unit's row is clipped to, over all parameters together."""
        ...

    def zeros(self, like: torch.Tensor) -> torch.Tensor:
        """Return an empty sum with the shape and device of `like`."""
        ...

    def fold(self, rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return Σᵢ factorᵢ · rowᵢ for one parameter: rows (units, n), factors (units,), result (n,), all finite."""
        ...

    def draw(self, like: Sequence[torch.Tensor], stream: SecureStream) -> tuple[torch.Tensor, ...]:
        """Return one step's noise for sums with the shapes of `like`. It knows no data and lies on the CPU."""
        ...

    def add_drawn(self, sums: Sequence[torch.Tensor], drawn: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return float32 sums with what `draw` returned, which is used up: it may be overwritten."""
        ...

    def add(self, sums: Sequence[torch.Tensor], stream: SecureStream) -> tuple[torch.Tensor, ...]:
        """Return float32 sums with fresh noise, in the gradient's units."""
        ...


@dataclass(frozen=True)
class GaussianNoise:
    """Adds N(0, (multiplier · sensitivity)²) to every coordinate, and rounds the result to a lattice.

    Noise is drawn, and added, in float64. The result is rounded to the multiples of `spacing`, a power of two between
    2^-19 and 2^-18 standard deviations, so that the values that can come out are the same for every sum: without it
    the low bits tell which sum the noise was added to (Mironov 2012). What that proves, and what it does not, is in
    docs/decisions/0005-noise.md.

    A lattice value of up to 32 standard deviations is exact in float32. Above, float32 rounds it to a coarser lattice:
    a function of the lattice value, so it tells nothing more. Sums must stay below 2^24 standard deviations.
    """

    multiplier: float
    sensitivity: float

    def __post_init__(self) -> None:
        if not (0 <= self.multiplier < math.inf and 0 <= self.sensitivity < math.inf):
            raise PrivacyError(f"{self} is no noise: both must be finite and at least 0")

    @property
    def standard_deviation(self) -> float:
        """The noise's standard deviation per coordinate."""
        return self.multiplier * self.sensitivity

    @property
    def clip_norm(self) -> float:
        """The L2 norm that a unit's row is clipped to: the sensitivity itself."""
        return self.sensitivity

    @property
    def spacing(self) -> float:
        """The lattice's spacing, 2^(⌊log₂ σ⌋ - 18). Rounding to it adds less than 2^-39 of the noise's variance."""
        return math.ldexp(1.0, math.frexp(self.standard_deviation)[1] - 1 - _LATTICE_BITS)

    def zeros(self, like: torch.Tensor) -> torch.Tensor:
        """Return an empty float64 sum with the shape and device of `like`."""
        return torch.zeros_like(like, dtype=torch.float64)

    def fold(self, rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return Σᵢ factorᵢ · rowᵢ, shape (n,), in float64."""
        return weighted_sum(rows, factors)

    def draw(self, like: Sequence[torch.Tensor], stream: SecureStream) -> tuple[torch.Tensor, ...]:
        """Return float64 standard normal tensors with the shapes of `like`; none where there is no noise."""
        if self.standard_deviation == 0:
            return ()
        sizes = [one.numel() for one in like]
        # All at once: an adapter has many small tensors, and a draw of its own for each costs half as much again.
        drawn = torch.from_numpy(stream.gaussian(sum(sizes))).split(sizes)
        return tuple(part.reshape(one.shape) for part, one in zip(drawn, like, strict=True))

    def add_drawn(self, sums: Sequence[torch.Tensor], drawn: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return float32 sums with what `draw` returned, which is overwritten."""
        if self.standard_deviation == 0:
            return tuple(value.to(torch.float32, copy=True) for value in sums)
        return tuple(self._noised(value, normal) for value, normal in zip(sums, drawn, strict=True))

    def add(self, sums: Sequence[torch.Tensor], stream: SecureStream) -> tuple[torch.Tensor, ...]:
        """Return float32 sums with fresh noise."""
        return self.add_drawn(sums, self.draw(sums, stream))

    def _noised(self, value: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        # A power of two: dividing and multiplying by it are exact.
        spacing = self.spacing
        steps = normal.to(value.device).mul_(self.standard_deviation / spacing).add_(value, alpha=1 / spacing).round_()
        return steps.mul_(spacing).to(torch.float32)


class NoiseAhead:
    """Draws the next step's noise in a background thread, while the step's gradients are computed.

    The results are those of drawing in the foreground from `stream.child("noise")`. One step's noise is drawn in
    advance (8 bytes per coordinate). After `steps` steps none is; who takes more all the same waits for each.
    """

    def __init__(self, noise: Noise, like: Sequence[torch.Tensor], stream: SecureStream, steps: int) -> None:
        self._noise = noise
        self._steps_left = steps
        self._like = tuple(like)
        self._stream = stream.child("noise")
        # One thread, so the steps' noises are drawn one after the other.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="noise")
        self._next: Future[tuple[torch.Tensor, ...]] | None = self._start()

    def add(self, sums: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return float32 sums with this step's noise, and start on the next one's.

        Raises:
            Exception: whatever went wrong in the thread.
        """
        drawn = (self._next or self._start()).result()
        self._steps_left -= 1
        # Before it is used: whatever happens below, no later sum gets the same noise.
        self._next = self._start() if self._steps_left > 0 else None
        return self._noise.add_drawn(sums, drawn)

    def close(self) -> None:
        """Wait for the thread and end it."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> Future[tuple[torch.Tensor, ...]]:
        return self._thread.submit(self._noise.draw, self._like, self._stream)
