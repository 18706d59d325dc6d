"""How a step's gradient is made: the interface that the training loop sees, and its builder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from privacy.example_level import OneByOneGradients, OpacusGradients
from privacy.no_privacy import PlainGradients
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream

__all__ = ["GradientRule", "gradient_rule"]


class GradientRule(Protocol):
    """Draws a step's records, takes their losses micro-batch by micro-batch, and leaves the step's gradient.

    `max_micro_batch` bounds the examples per micro-batch, or is None.
    """

    max_micro_batch: int | None
    clipped: int
    non_finite: int

    def draw(self, num_records: int) -> list[int]:
        """Return the positions of the records that this step uses."""
        ...

    def accumulate(self, losses: torch.Tensor) -> None:
        """Take one micro-batch's per-example losses, shape (examples,), through the backward pass."""
        ...

    def finish(self) -> None:
        """Write the step's gradient into `.grad` of every trained parameter, also after an empty draw."""
        ...

    def close(self) -> None:
        """Leave the network as it was found."""
        ...


def gradient_rule(
    plan: PrivacyPlan, per_example: str, network: nn.Module, trained: Mapping[str, nn.Parameter], stream: SecureStream
) -> GradientRule:
    """Return the rule for a plan.

    Args:
        plan: what is promised.
        per_example: `opacus` or `one_by_one`; without privacy it is not used.
        network: the whole network, in which hooks may be set.
        trained: the parameters that training moves, by name.
        stream: the randomness of sampling and noise.

    Raises:
        PrivacyError: naming the first layer that has no per-example rule.
    """
    if not plan.is_private:
        return PlainGradients(plan, trained, stream)
    if per_example == "one_by_one":
        return OneByOneGradients(plan, trained, stream)
    return OpacusGradients(plan, network, trained, stream)
