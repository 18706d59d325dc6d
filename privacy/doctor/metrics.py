"""Check of what leaves beside the update: a reply's header must tell nothing about the records."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from privacy.doctor.subject import ObservedRound, Subject, Verdict
from protocol.metrics import METRICS

__all__ = ["no_metric_leaves_unprotected"]

_NAME = "no metric leaves unprotected"


def no_metric_leaves_unprotected(subject: Subject) -> Verdict:
    """Two sites that differ in one unit and in every loss and gradient answer with the same header.

    Losses, gradient norms, clip fractions, counts and times would all differ; a noised, charged loss may. Cards and
    plans are equal too, since both follow from what is published; and that no loss of a round is finite is not told.
    """
    if not subject.promise.is_private:
        return Verdict(_NAME, None, "nothing is promised")
    told = sorted({name for name in subject.cards[0] if subject.cards[0][name] != subject.cards[1].get(name)})
    if told:
        return Verdict(_NAME, False, f"{', '.join(told)} of the card depends on the records")
    if subject.plan.is_private and subject.plan != subject.silenced_plan:
        mine, others = asdict(subject.plan), asdict(subject.silenced_plan)
        differing = ", ".join(name for name in mine if mine[name] != others[name])
        return Verdict(_NAME, False, f"{differing} of the privacy plan depends on the records")
    noised = {name for name, metric in METRICS.items() if metric.kind == "dp" and subject.plan.loss is not None}
    allowed = noised | {name for name, metric in METRICS.items() if metric.kind == "public"}
    for number, pair in enumerate(zip(subject.trained, subject.silenced, strict=True), start=1):
        metrics = sorted({name for observed in pair for name in observed.header.metrics} - allowed)
        if metrics:
            return Verdict(_NAME, False, f"round {number}: {', '.join(metrics)} left the site, and no ε covers it")
        left, right = (_comparable(observed, noised) for observed in pair)
        told = sorted(key for key in left if left[key] != right[key])
        if told:
            return Verdict(_NAME, False, f"round {number}: {', '.join(told)} in the header depends on the records")
    besides = f"; {', '.join(sorted(noised))} leaves with noise" if noised else ""
    return Verdict(_NAME, True, f"headers are equal whatever the records say{besides}")


def _comparable(observed: ObservedRound, noised: set[str]) -> dict[str, Any]:
    header = observed.header.model_dump(mode="json")
    del header["adapter_digest"]  # repeats what the server sent
    del header["ledger_heads"]  # a hash over entries that name the records by a keyed hash: a random name to a stranger
    del header["below_clip"]  # adaptive clipping: for the server alone, which noises and charges the count
    header["metrics"] = {name: value for name, value in header["metrics"].items() if name not in noised}
    return header
