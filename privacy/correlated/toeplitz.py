"""Lower-triangular Toeplitz strategy matrices with a few bands; one band is independent noise."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from scipy.signal import lfilter

from privacy.correlated.factorization import Draw
from privacy.correlated.participation import Participation

__all__ = ["BandedToeplitz", "square_root", "toeplitz_sensitivity"]


@dataclass(frozen=True)
class BandedToeplitz:
    """C[t, s] = coefficients[t - s] for 0 <= t - s < bands; `coefficients` start at 1, fall and are not negative."""

    coefficients: tuple[float, ...]

    def sensitivity(self, participation: Participation) -> float:
        """See `toeplitz_sensitivity`.

        Where the bands are no wider than the minimum separation, a unit's columns do not overlap, and this is the
        square root of the participations times the norm of a column (arXiv 2306.08153, theorem 2).
        """
        padded = np.zeros(participation.rounds)
        kept = min(len(self.coefficients), participation.rounds)
        padded[:kept] = self.coefficients[:kept]
        return toeplitz_sensitivity(padded, participation)

    def prefix_variances(self, rounds: int) -> np.ndarray:
        """Return the squared row norms of A C⁻¹."""
        impulse = np.zeros(rounds)
        impulse[0] = 1.0
        inverse = np.asarray(lfilter([1.0], self.coefficients, impulse))
        return np.cumsum(np.cumsum(inverse) ** 2)

    def start(self) -> BandedNoise:
        """Return the noise of a new run."""
        return BandedNoise(self.coefficients)


class BandedNoise:
    """Solves C ẑ = z row by row; keeps the last bands - 1 rounds of ẑ."""

    def __init__(self, coefficients: tuple[float, ...]) -> None:
        self._lags = coefficients[1:]
        self._past: deque[np.ndarray] = deque(maxlen=len(self._lags))

    def next(self, draw: Draw) -> np.ndarray:
        """Return ẑₜ = zₜ - Σᵢ cᵢ ẑₜ₋ᵢ."""
        noise = draw().copy()
        for coefficient, past in zip(self._lags, self._past, strict=False):
            noise -= coefficient * past
        self._past.appendleft(noise.copy())
        return noise


def square_root(bands: int) -> tuple[float, ...]:
    """Return the first coefficients of √A: C(2i, i) / 4^i, the optimum without bands (Fichtenberger et al. 2023)."""
    coefficients = [1.0]
    for index in range(1, bands):
        coefficients.append(coefficients[-1] * (2 * index - 1) / (2 * index))
    return tuple(coefficients)


def toeplitz_sensitivity(coefficients: np.ndarray, participation: Participation) -> float:
    """Return the L2 sensitivity of a Toeplitz C whose coefficients fall and are not negative.

    The worst unit takes part in rounds 0, b, 2b, ... as often as it may, always in the same direction (Kalinin and
    Lampert 2024, arXiv 2405.13763, theorem 2).

    Args:
        coefficients: first column of C, shape (rounds,).
        participation: the limits.

    Raises:
        ValueError: for other coefficients; the theorem says nothing about them.
    """
    if np.any(coefficients < 0) or np.any(np.diff(coefficients) > 0):
        raise ValueError(
            "the sensitivity of a Toeplitz matrix is known for coefficients that fall and are not negative"
        )
    total = np.zeros(participation.rounds)
    for start in range(0, participation.most * participation.min_separation, participation.min_separation):
        total[start:] += coefficients[: participation.rounds - start]
    return float(np.linalg.norm(total))
