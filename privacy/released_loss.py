"""The training loss of a round, released with noise: a second Gaussian release of each step's sample.

The gradient's ε covers the gradient alone. A plan that releases the loss accounts both as one mechanism
(`PrivacyPlan.mechanism`), so here the loss gets the bound and the noise that were accounted.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from privacy.plan import LossRelease, PrivacyPlan
from privacy.randomness import SecureStream

__all__ = ["ReleasedLoss"]


class ReleasedLoss:
    """Sums each step's unit losses, bounded to [0, clip], and adds N(0, (noise_multiplier · clip)²) to every sum."""

    def __init__(self, plan: PrivacyPlan, release: LossRelease) -> None:
        # The same kind of noise as the gradient's, with the loss's own bound and multiplier.
        self._noise = replace(plan, noise_multiplier=release.noise_multiplier, clip_norm=release.clip).noise(1)
        self._normalizer = plan.normalizer
        self._step = self._empty()
        self._total, self._steps = 0.0, 0

    @property
    def value(self) -> float | None:
        """The mean over finished steps of noised sum / normalizer; None before the first."""
        return None if self._steps == 0 else self._total / self._steps

    def accumulate(self, unit_losses: torch.Tensor) -> None:
        """Add the losses of some units, shape (units,); one that is not finite counts as zero, as its gradient does."""
        bounded = unit_losses.nan_to_num(0.0, 0.0, 0.0).clamp(0.0, self._noise.clip_norm).cpu()
        self._step = self._step + self._noise.fold(bounded[:, None], torch.ones(len(bounded)))

    def finish(self, stream: SecureStream) -> None:
        """Close the step: add its noise, also to an empty sum."""
        (noised,) = self._noise.add((self._step,), stream)
        self._total += float(noised) / self._normalizer
        self._steps += 1
        self._step = self._empty()

    def _empty(self) -> torch.Tensor:
        return self._noise.zeros(torch.zeros(1))
