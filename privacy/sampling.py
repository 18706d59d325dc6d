"""Which records a step uses: Poisson sampling, with a rate that is public."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from privacy.randomness import SecureStream
from protocol.errors import PrivacyError

__all__ = ["PoissonSampling"]


@dataclass(frozen=True)
class PoissonSampling:
    """Each record is drawn independently with probability `rate`.

    The fields are public. The number of records is a secret, so it is an argument of `draw` and never a part of the
    rate: a rate derived from it would tell it (and a neighbouring data set would get another rate).
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise PrivacyError(
                f"the sampling rate is {self.rate:.4g}, it must lie in (0, 1]: expected_batch_size must not exceed the "
                "site's published record count; lower federation.local.expected_batch_size or leave the site out"
            )

    def draw(self, num_records: int, stream: SecureStream) -> list[int]:
        """Return the positions drawn for one step, in ascending order; possibly none."""
        return np.flatnonzero(stream.uniform(num_records) < self.rate).tolist()
