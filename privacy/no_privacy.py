"""Training without protection: the same sampling and the same normalizer, ordinary gradients, no noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream

__all__ = ["PlainGradients"]


class PlainGradients:
    """The sum of the drawn records' gradients over the public normalizer."""

    max_micro_batch: int | None = None
    clipped = 0
    non_finite = 0
    released_loss: float | None = None

    def __init__(self, plan: PrivacyPlan, trained: Mapping[str, nn.Parameter], stream: SecureStream) -> None:
        self._plan = plan
        self._trained = trained
        self._stream = stream

    def draw(self, num_units: int) -> list[int]:
        """Return the positions of the units that this step uses."""
        return self._plan.sampling.draw(num_units, self._stream)

    def accumulate(self, losses: torch.Tensor, owners: torch.Tensor | None = None) -> None:
        """Add the micro-batch's gradient to `.grad`; rows of owner -1 are padding."""
        (losses if owners is None else losses[owners >= 0]).sum().backward()

    def finish(self) -> None:
        """Divide by the normalizer; an empty draw leaves zero."""
        for parameter in self._trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad /= self._plan.normalizer

    def close(self) -> None:
        """Nothing was attached to the network."""
