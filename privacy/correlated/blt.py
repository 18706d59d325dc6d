"""Buffered linear Toeplitz noise (Dvijotham et al. 2024, arXiv 2404.16706; McMahan et al. 2024, arXiv 2408.08868).

C is Toeplitz with coefficients 1 and then Σ_d ω_d θ_d^(i-1): memory for a few buffers, whatever the number of rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import minimize
from scipy.signal import lfilter

from privacy.correlated.factorization import Draw
from privacy.correlated.participation import Participation
from privacy.correlated.toeplitz import toeplitz_sensitivity

__all__ = ["BufferedToeplitz", "optimal_blt"]


@dataclass(frozen=True)
class BufferedToeplitz:
    """Output weights ω > 0, Σω <= 1, and decays 0 < θ < 1, one each per buffer: the coefficients fall from 1 to 0."""

    weights: tuple[float, ...]
    decays: tuple[float, ...]

    def coefficients(self, rounds: int) -> np.ndarray:
        """Return the first column of C, shape (rounds,)."""
        powers = np.power(np.array(self.decays)[:, None], np.arange(rounds - 1)[None, :])
        return np.concatenate([[1.0], np.array(self.weights) @ powers])

    def sensitivity(self, participation: Participation) -> float:
        """See `toeplitz_sensitivity`."""
        return toeplitz_sensitivity(self.coefficients(participation.rounds), participation)

    def prefix_variances(self, rounds: int) -> np.ndarray:
        """Return the squared row norms of A C⁻¹."""
        # The generating function of C is a quotient P/Q of polynomials, and that of A C⁻¹ is Q / (P (1 - x)).
        denominator = np.poly(self.decays)
        numerator = denominator.copy()
        for index, weight in enumerate(self.weights):
            numerator[1:] += weight * np.poly(np.delete(self.decays, index))
        impulse = np.zeros(rounds)
        impulse[0] = 1.0
        return np.cumsum(np.cumsum(lfilter(denominator, numerator, impulse)) ** 2)

    def start(self) -> BufferedNoise:
        """Return the noise of a new run."""
        return BufferedNoise(self.weights, self.decays)


class BufferedNoise:
    """Solves C ẑ = z row by row (arXiv 2404.16706, algorithm 1); keeps one vector per buffer."""

    def __init__(self, weights: tuple[float, ...], decays: tuple[float, ...]) -> None:
        self._weights, self._decays = weights, decays
        self._buffers: list[np.ndarray | float] = [0.0 for _ in weights]

    def next(self, draw: Draw) -> np.ndarray:
        """Return ẑₜ = zₜ - Σ_d ω_d s_d, then s_d ← θ_d s_d + ẑₜ."""
        noise = draw().copy()
        for weight, buffer in zip(self._weights, self._buffers, strict=True):
            noise -= weight * buffer
        self._buffers = [decay * buffer + noise for decay, buffer in zip(self._decays, self._buffers, strict=True)]
        return noise


@lru_cache(maxsize=32)
def optimal_blt(buffers: int, participation: Participation) -> BufferedToeplitz:
    """Return the parameters with the least mean squared error of the prefix sums at unit sensitivity, as far as found.

    Starts from a quadrature of 1/√(1-x) = 1/π ∫ t^(-1/2) (1-t)^(-1/2) / (1 - t x) dt, the square root of A, and
    descends without gradients. Any parameters are private; better ones are only less noisy.
    """

    def parameters(point: np.ndarray) -> BufferedToeplitz:
        decays = 1 / (1 + np.exp(-np.clip(point[buffers:], -30, 15)))
        weights = np.exp(np.clip(point[:buffers], -30, 0))
        weights = weights / max(float(weights.sum()), 1.0)
        return BufferedToeplitz(tuple(weights.tolist()), tuple(decays.tolist()))

    def loss(point: np.ndarray) -> float:
        blt = parameters(point)
        error = float(blt.prefix_variances(participation.rounds).mean())
        return float(np.log(error * blt.sensitivity(participation) ** 2))

    found = minimize(loss, _quadrature(buffers, participation.rounds), method="Nelder-Mead", options={"maxfev": 2000})
    return parameters(found.x)


def _quadrature(buffers: int, rounds: int) -> np.ndarray:
    """Return log weights and logits of the decays: nodes whose 1 - θ are spaced evenly on a log scale from 1 to 1/n."""
    edges = np.geomspace(1 / (rounds + 1), 1.0, buffers + 1)
    rest = np.sqrt(edges[:-1] * edges[1:])
    # The density's integral over an interval of t = 1 - u is 2/π (asin √u) at its ends.
    weights = np.diff(2 / np.pi * np.arcsin(np.sqrt(edges))) * (1 - rest)
    return np.concatenate([np.log(weights), np.log((1 - rest) / rest)])
