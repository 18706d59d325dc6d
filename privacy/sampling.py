"""Which units a step uses: truncated Poisson sampling over a public number of slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privacy.mechanisms import Truncation
from privacy.randomness import SecureStream
from protocol.errors import PrivacyError

__all__ = ["PoissonSampling"]


@dataclass(frozen=True)
class PoissonSampling:
    """Each slot is drawn independently with probability `rate`; of more than `cap` drawn slots a random `cap` is kept.

    Every field is public. The true number of units is a secret: it is an argument of `draw` and never a part of the
    rate, which would tell it (and a neighbouring data set would get another rate). A site publishes a number of slots
    instead. Unit i lies in slot i, further slots are empty, and the cut is made among slots, empty ones included: that
    is the mechanism whose neighbours differ in one emptied slot (arXiv 2508.15089). A plan refuses
    more units than slots.
    """

    rate: float
    slots: int
    cap: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise PrivacyError(
                f"the sampling rate is {self.rate:.4g}, it must lie in (0, 1]: expected_batch_size must not exceed the "
                "site's published count; lower federation.local.expected_batch_size or leave the site out"
            )

    @property
    def truncation(self) -> Truncation | None:
        """The cut, for the accountant; None where no draw can be cut."""
        return None if self.cap is None or self.cap >= self.slots else Truncation(self.slots, self.cap)

    def draw(self, num_units: int, stream: SecureStream) -> list[int]:
        """Return the positions drawn for one step, in ascending order; possibly none."""
        drawn = np.flatnonzero(stream.uniform(self.slots) < self.rate)
        if self.truncation is not None and len(drawn) > self.truncation.cap:
            # The slots with the smallest of independent uniform keys are a uniformly random subset.
            kept = np.argsort(stream.uniform(len(drawn)), kind="stable")[: self.truncation.cap]
            drawn = np.sort(drawn[kept])
        return drawn[drawn < num_units].tolist()
