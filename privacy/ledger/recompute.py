"""What stated figures ought to be, by ways that share as little as possible with the ones that stated them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, reduce

from dp_accounting.pld import privacy_loss_distribution as pld

from privacy.mechanisms import SubsampledGaussian

__all__ = ["lower_bound"]

_GRID = 1e-4
"""Fixed, so that no search for a grid is shared with the accountant that is checked."""


def lower_bound(mechanisms: Sequence[SubsampledGaussian], delta: float) -> float:
    """Return an ε that the true one cannot be below: losses rounded *down* to a fixed grid, by privacy buckets.

    Cut batches and discrete noise are taken as uncut and continuous, which they differ from by little.
    """
    steps = _steps(mechanisms)
    if not steps:
        return 0.0
    if any(noise == 0 for _, noise in steps):
        return math.inf
    losses = [_one_step(rate, noise).self_compose(count) for (rate, noise), count in steps.items()]
    return float(reduce(lambda left, right: left.compose(right), losses).get_epsilon_for_delta(delta))


def _steps(mechanisms: Sequence[SubsampledGaussian]) -> dict[tuple[float, float], int]:
    steps: dict[tuple[float, float], int] = {}
    for mechanism in mechanisms:
        if mechanism.steps:
            key = (mechanism.sampling_rate, mechanism.noise_multiplier)
            steps[key] = steps.get(key, 0) + mechanism.steps
    return steps


@lru_cache(maxsize=16)
def _one_step(rate: float, noise: float) -> pld.PrivacyLossDistribution:
    return pld.from_gaussian_mechanism(
        noise,
        pessimistic_estimate=False,
        value_discretization_interval=_GRID,
        sampling_prob=rate,
        use_connect_dots=False,
    )
