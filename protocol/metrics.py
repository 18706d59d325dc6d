"""What each metric tells, and so whether it may leave a site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from protocol.errors import PrivacyError, ReplyRejected

__all__ = ["LARGEST_METRIC", "METRICS", "Metric", "MetricClass", "check_metric", "releasable"]

LARGEST_METRIC = 1e9
"""In size. Strategies compute with what sites release: powers and products of more would leave the floating point."""

MetricClass = Literal["public", "dp", "private"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    ========  ==========================================================================
    class     meaning
    ========  ==========================================================================
    public    follows from the plan alone, never from a record
    dp        computed from records, noised, and charged to the same budget as the update
    private   computed from records; never leaves a site whose records are protected
    ========  ==========================================================================
    """

    kind: MetricClass
    meaning: str


METRICS: Mapping[str, Metric] = {
    "steps": Metric("public", "optimizer steps of the round"),
    "noisy_training_loss": Metric("dp", "mean training loss of the round, each unit's bounded, with Gaussian noise"),
    "training_loss": Metric("private", "mean training loss of the round"),
    "examples": Metric("private", "records drawn in the round"),
    "clipped": Metric("private", "units whose gradient was above the clip norm"),
    "non_finite": Metric("private", "units whose gradient was not finite and counted as zero"),
    "seconds": Metric("private", "run time of the round"),
}


def releasable(metrics: Mapping[str, float], *, protected: bool) -> dict[str, float]:
    """Return the metrics of a reply, having checked that each may leave.

    A value that is not finite is left out: JSON cannot carry it.

    Raises:
        PrivacyError: an unknown metric, or a private one while records are protected.
    """
    for name in metrics:
        metric = METRICS.get(name)
        if metric is None:
            raise PrivacyError(f"metric {name!r} has no class; declare it in protocol/metrics.py: {', '.join(METRICS)}")
        if protected and metric.kind == "private":
            raise PrivacyError(
                f"metric {name!r} ({metric.meaning}) is private and no ε covers it; set "
                "privacy.loss_noise_multiplier to release the loss with noise, or keep it at the site"
            )
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def check_metric(name: str, value: float) -> None:
    """Check a metric of a reply: finite, and at most `LARGEST_METRIC` in size.

    Raises:
        ReplyRejected: code `wrong_metric`.
    """
    # The comparison is false for NaN.
    if not abs(value) <= LARGEST_METRIC:
        raise ReplyRejected("wrong_metric", f"the reply states {name[:40]}={value:g}, above {LARGEST_METRIC:g} in size")
