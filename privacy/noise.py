"""Gaussian noise, scaled by the sensitivity of what it is added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from privacy.randomness import SecureStream

__all__ = ["GaussianNoise"]


@dataclass(frozen=True)
class GaussianNoise:
    """Adds N(0, (multiplier · sensitivity)²) to every coordinate."""

    multiplier: float
    sensitivity: float

    @property
    def standard_deviation(self) -> float:
        """The noise's standard deviation per coordinate."""
        return self.multiplier * self.sensitivity

    @property
    def clip_norm(self) -> float:
        """What rows must be clipped to before `fold`."""
        return self.sensitivity

    def zeros(self, like: torch.Tensor) -> torch.Tensor:
        """Return an empty accumulator for a parameter."""
        return torch.zeros_like(like, dtype=torch.float32)

    def fold(self, rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return Σᵤ factorᵤ · rowᵤ in float32, for rows of shape (units, n)."""
        return torch.mv(rows.float().T, factors.float())

    def add(self, sums: Sequence[torch.Tensor], stream: SecureStream) -> tuple[torch.Tensor, ...]:
        """Return float32 sums with fresh noise, drawn in float64."""
        return tuple(value + self._like(value, stream) for value in sums)

    def _like(self, value: torch.Tensor, stream: SecureStream) -> torch.Tensor:
        drawn = stream.gaussian(value.numel()) * self.standard_deviation
        return torch.from_numpy(drawn).to(dtype=torch.float32, device=value.device).reshape(value.shape)
