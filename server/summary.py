"""`summary.json`: everything a run did, folded from its events. docs/run_directory.md explains each key."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

from conf.schema.experiment import Experiment
from conf.schema.privacy import ClientLevel, LocalPrivacy, NoPrivacy, Privacy, local_privacy
from finetuning.tasks.build import OBJECTIVES
from finetuning.tokenization_report import TokenizationReport
from protocol.instructions import PrivacyStatement
from server.events import (
    BestKept,
    Evaluated,
    Event,
    PersonalEvaluated,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    SiteReplied,
    StoppedEarly,
)
from server.statements import epsilon_of_group, epsilon_over_several

__all__ = ["SUMMARY_VERSION", "WHAT_TO_CHANGE", "is_better", "no_better_than", "summarize", "tuned_quality"]

SUMMARY_VERSION = 1
"""Raised when a key changes its meaning or goes; new keys may come without it."""

_PACKAGES = ("cloister", "flwr", "opacus", "dp-accounting", "torch", "transformers", "peft")
_LOST = ("no_reply", "flower_error", "malformed_reply", "site_error", "site_down", "site_silent")
"""Codes after which a site may have trained: its process may have been killed, or hung, after it had reserved."""
_HIGHER_IS_BETTER = frozenset(each.metric for each in (make() for make in OBJECTIVES.values()) if each.higher_is_better)
_REMEDY = (
    "More records or sites, a larger ε, or fewer trained values (peft=head for a classifier, a lower peft.rank) leave "
    "more signal beside the noise; cloister plan prints their ratio."
)
WHAT_TO_CHANGE = {
    "base": (
        "no better than the base",
        "On held-out records the tuned model is not better than the base that it started from: use the base. "
        f"{_REMEDY}",
    ),
    "majority": (
        "no better than one answer",
        "On held-out records the tuned model is right no more often than one that always says the most frequent class. "
        f"{_REMEDY}",
    ),
}
"""What a run that ends so says, by what `no_better_than` returns: a title, and what to change."""
_WITHHELD: dict[str, Any] = {"down": None, "up": None}
_PHASES = ("train", "aggregate", "evaluate", "other")


def summarize(
    experiment: Experiment,
    events: Sequence[Event],
    *,
    base_digest: str,
    started: datetime,
    status: str,
    error: str = "",
    records: Mapping[str, TokenizationReport] | None = None,
) -> dict[str, Any]:
    """Return the summary of a run, finished or failed, as plain JSON values.

    `records` says what became of each simulated site's rows; None where sites are real.
    """
    first = next((event for event in events if isinstance(event, RunStarted)), None)
    finished = next((event for event in events if isinstance(event, RunFinished)), None)
    rounds: list[dict[str, Any]] = _rounds(events)
    withheld = any(isinstance(event, RoundFinished) and event.accepted is None for event in events)
    if withheld:  # whom a secret cohort holds shows in what was sent
        rounds = [{**item, "bytes": dict(_WITHHELD)} for item in rounds]
    return {
        "schema_version": SUMMARY_VERSION,
        "run": first.run if first else "",
        "started": started.isoformat(timespec="seconds"),
        "status": status,
        "error": error,
        "stopped": next((event.reason for event in events if isinstance(event, StoppedEarly)), None),
        "config_digest": experiment.digest,
        "model": {"path": experiment.model.path, "base_digest": base_digest},
        "adapter": {
            "digest": finished.adapter_digest if finished else "",
            "trained_values": first.trained_values if first else 0,
        },
        "strategy": experiment.strategy.kind,
        "privacy": _privacy(experiment, events),
        "sites": {
            name: site | ({"bytes": dict(_WITHHELD)} if withheld else {}) for name, site in _sites(events).items()
        },
        "records": None if records is None else {name: report.counts() for name, report in records.items()},
        "rounds": rounds,
        "final": _final(events),
        "bytes": dict(_WITHHELD)
        if withheld
        else {way: sum(item["bytes"][way] for item in rounds) for way in _WITHHELD},
        "seconds": {
            **{phase: _total(item["seconds"].get(phase, 0.0) for item in rounds) for phase in _PHASES},
            "total": finished.seconds if finished else None,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def _total(parts: Iterable[float | None]) -> float | None:
    """Return the sum; None where any part is withheld."""
    known = list(parts)
    return None if None in known else sum(part for part in known if part is not None)


def _privacy(experiment: Experiment, events: Sequence[Event]) -> dict[str, Any]:
    config = experiment.privacy
    local = local_privacy(config)
    several = experiment.federation.sites_per_person
    promises = (_server_promise(config, events, several), _site_promise(local, events, several))
    joint = [promise for promise in promises if promise]
    replies = [event for event in events if isinstance(event, SiteReplied)]
    return {
        "kind": config.kind,
        **(joint[0] if joint else _promise(None, None, None, several, None)),
        "insecure_seed": any(not isinstance(c, NoPrivacy) and c.insecure_seed is not None for c in (config, local)),
        # A reply that never arrived may have been trained for: then only the sites' ledgers know what was spent.
        "at_least": not isinstance(local, NoPrivacy) and any(reply.code in _LOST for reply in replies),
        "joint": joint,
    }


def _promise(
    statement: PrivacyStatement | None, epsilon: float | None, delta: float | None, several: int, joint: float | None
) -> dict[str, Any]:
    return {
        "unit": statement.unit if statement else None,
        "relation": statement.relation if statement else None,
        "accountant": statement.accountant if statement else None,
        "epsilon": epsilon,
        "delta": delta,
        "sites_per_person": several,
        "epsilon_over_sites": joint,
    }


def _server_promise(config: Privacy, events: Sequence[Event], several: int) -> dict[str, Any] | None:
    """Return what the server's noise promises for a whole site."""
    if not isinstance(config, ClientLevel):
        return None
    stated = [event.privacy for event in events if isinstance(event, RoundFinished) and event.privacy]
    if not stated:
        return _promise(None, 0.0, None, several, 0.0)
    last = stated[-1]
    joint = last.epsilon_run if several == 1 else _at_least(last.epsilon_run, epsilon_of_group(last, several))
    return _promise(last, last.epsilon_run, last.delta, several, joint)


def _site_promise(config: LocalPrivacy, events: Sequence[Event], several: int) -> dict[str, Any] | None:
    """Return what the sites' own noise promises: a record lives at one site, so it is the worst site's, never a sum.

    What a site states in a reply that is not used counts: the update was seen. A site that lies could say the same in
    one that is used, and leaving it out would understate what honest sites have spent.
    """
    if isinstance(config, NoPrivacy):
        return None
    latest = {event.site: event.privacy for event in events if isinstance(event, SiteReplied) and event.privacy}
    epsilon = max((statement.epsilon_run for statement in latest.values()), default=0.0)
    delta = max((statement.delta or 0.0 for statement in latest.values()), default=None)
    stated = list(latest.values())
    joint = epsilon if several == 1 or not delta else _at_least(epsilon, epsilon_over_several(stated, several))
    return _promise(stated[-1] if stated else None, epsilon, delta, several, joint)


def _at_least(epsilon: float, joint: float | None) -> float | None:
    """Return the ε of several, which is never below that of one; None where it is unknown."""
    return None if joint is None else max(epsilon, joint)


def _sites(events: Sequence[Event]) -> dict[str, Any]:
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    return {
        site: _site(
            site, [event for event in events if isinstance(event, SiteReplied) and event.site == site], evaluated
        )
        for site in (started.sites if started else ())
    }


def _site(site: str, replies: Sequence[SiteReplied], evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    statements = [reply.privacy for reply in replies if reply.privacy]
    quality = [event.groups[site] for event in evaluated if site in event.groups]
    return {
        "privacy": statements[-1].model_dump() if statements else None,
        "accepted": sum(reply.accepted for reply in replies),
        "rejected": sum(not reply.accepted for reply in replies),
        "bytes": {"down": sum(reply.bytes_down for reply in replies), "up": sum(reply.bytes_up for reply in replies)},
        "quality": {"first": quality[0], "last": quality[-1]} if quality else None,
    }


def _rounds(events: Sequence[Event]) -> list[dict[str, Any]]:
    return [
        _round(event, [other for other in events if getattr(other, "round", None) == event.round])
        for event in events
        if isinstance(event, RoundStarted)
    ]


def _round(started: RoundStarted, events: Sequence[Event]) -> dict[str, Any]:
    replies = [event for event in events if isinstance(event, SiteReplied)]
    finished = next((event for event in events if isinstance(event, RoundFinished)), None)
    evaluated = next((event for event in events if isinstance(event, Evaluated)), None)
    return {
        "round": started.round,
        "cohort": list(started.cohort),
        "accepted": [reply.site for reply in replies if reply.accepted],
        "rejected": [
            {"site": reply.site, "code": reply.code, "reason": reply.reason} for reply in replies if not reply.accepted
        ],
        "epsilon": {
            reply.site: reply.privacy.epsilon_run for reply in replies if reply.privacy and reply.privacy.delta
        },
        "metrics": {reply.site: reply.metrics for reply in replies if reply.metrics},
        "update_norm": finished.update_norm if finished else None,
        "strategy_metrics": finished.metrics if finished else {},
        "evaluation": _evaluation(evaluated),
        "bytes": {"down": sum(reply.bytes_down for reply in replies), "up": sum(reply.bytes_up for reply in replies)},
        "seconds": {phase: getattr(finished, f"{phase}_s") for phase in _PHASES} if finished else {},
    }


def _evaluation(event: Evaluated | None) -> dict[str, Any] | None:
    if event is None:
        return None
    return {
        "metric": event.metric,
        "value": event.value,
        "loss": event.loss,
        "units": event.units,
        "groups": event.groups,
        "figures": event.figures,
    }


def _final(events: Sequence[Event]) -> dict[str, Any] | None:
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    if not evaluated:
        return None
    kept = next((event.round for event in events if isinstance(event, BestKept)), None)
    first, last = evaluated[0], next((each for each in evaluated if each.round == kept), evaluated[-1])
    return {
        "metric": last.metric,
        "base": first.value if first.round == 0 else None,
        "base_groups": first.groups if first.round == 0 else {},
        "value": last.value,
        "round": last.round,
        "groups": last.groups,
        "figures": last.figures,
        "group_figures": last.group_figures,
        "by_class": last.by_class,
        "best_kept": kept is not None,
        "personal": _personal(events),
    }


def _personal(events: Sequence[Event]) -> dict[str, Any] | None:
    found = next((event for event in events if isinstance(event, PersonalEvaluated)), None)
    return None if found is None else {"value": found.value, "groups": found.groups}


def no_better_than(final: Mapping[str, Any] | None) -> str | None:
    """Return what the model that sites use after a run is not better than on held-out records, from a summary's
    `final`: the base before it, or the most frequent class; None where it is, or where nothing was measured."""
    if final is None or final["round"] == 0:
        return None
    tuned, _ = tuned_quality(final)
    if final["base"] is not None and not is_better(final["metric"], tuned, final["base"]):
        return "base"
    majority = final.get("figures", {}).get("majority")
    return "majority" if majority is not None and not tuned > majority else None


def is_better(metric: str, value: float, other: float) -> bool:
    """Return whether a value of a metric is better than another; one that is no number never is."""
    return value > other if metric in _HIGHER_IS_BETTER else value < other


def tuned_quality(final: Mapping[str, Any]) -> tuple[float, Mapping[str, float]]:
    """Return the quality of what sites use after a run, whole and by group, from a summary's `final`: of their own
    models where they keep a part of them, else of the server's."""
    found = final.get("personal") or final
    return found["value"], found["groups"]
