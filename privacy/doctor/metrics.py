"""Check of what leaves beside the update: a reply's header must tell nothing about the records."""

from __future__ import annotations

from typing import Any

from privacy.doctor.subject import ObservedRound, Subject, Verdict

__all__ = ["DP_METRICS", "no_metric_leaves_unprotected"]

DP_METRICS = frozenset({"training_loss"})
"""Metrics that may leave when the plan releases them with noise, which is charged."""
_NAME = "no metric leaves unprotected"


def no_metric_leaves_unprotected(subject: Subject) -> Verdict:
    """Two sites that differ in one record and in every loss and gradient answer with the same header.

    Losses, gradient norms, clip fractions, counts and times would all differ; a noised, charged loss may.
    """
    allowed: frozenset[str] = DP_METRICS if subject.plan.loss is not None else frozenset()
    for number, pair in enumerate(zip(subject.trained, subject.silenced, strict=True), start=1):
        metrics = sorted({name for observed in pair for name in observed.header.metrics} - allowed)
        if metrics:
            return Verdict(_NAME, False, f"round {number}: {', '.join(metrics)} left the site, and no ε covers it")
        left, right = (_comparable(observed, allowed) for observed in pair)
        told = sorted(key for key in left if left[key] != right[key])
        if told:
            return Verdict(_NAME, False, f"round {number}: {', '.join(told)} in the header depends on the records")
    noised = f"; {', '.join(sorted(allowed))} leaves with noise" if allowed else ""
    return Verdict(_NAME, True, f"headers are equal whatever the records say{noised}")


def _comparable(observed: ObservedRound, allowed: frozenset[str]) -> dict[str, Any]:
    header = observed.header.model_dump(mode="json")
    del header["adapter_digest"]  # repeats what the server sent
    header["metrics"] = {name: value for name, value in header["metrics"].items() if name not in allowed}
    return header
