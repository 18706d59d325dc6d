"""`summary.json`: everything a run did, folded from its events. docs/run_directory.md explains each key."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

from conf.schema.experiment import Experiment
from conf.schema.privacy import NoPrivacy
from server.events import Evaluated, Event, RoundFinished, RoundStarted, RunFinished, RunStarted, SiteReplied

__all__ = ["SUMMARY_VERSION", "summarize"]

SUMMARY_VERSION = 1
"""Raised when a key changes its meaning or goes; new keys may come without it."""

_PACKAGES = ("cloister", "flwr", "opacus", "dp-accounting", "torch", "transformers", "peft")
_LOST = ("no_reply", "flower_error", "malformed_reply", "site_error")
_PHASES = ("train", "aggregate", "evaluate", "other")


def summarize(
    experiment: Experiment,
    events: Sequence[Event],
    *,
    base_digest: str,
    started: datetime,
    status: str,
    error: str = "",
) -> dict[str, Any]:
    """Return the summary of a run, finished or failed, as plain JSON values."""
    first = next((event for event in events if isinstance(event, RunStarted)), None)
    finished = next((event for event in events if isinstance(event, RunFinished)), None)
    rounds = _rounds(events)
    return {
        "schema_version": SUMMARY_VERSION,
        "run": first.run if first else "",
        "started": started.isoformat(timespec="seconds"),
        "status": status,
        "error": error,
        "config_digest": experiment.digest,
        "model": {"path": experiment.model.path, "base_digest": base_digest},
        "adapter": {
            "digest": finished.adapter_digest if finished else "",
            "trained_values": first.trained_values if first else 0,
        },
        "strategy": experiment.strategy.kind,
        "privacy": _privacy(experiment, events),
        "sites": _sites(events),
        "rounds": rounds,
        "final": _final(events),
        "bytes": {way: sum(item["bytes"][way] for item in rounds) for way in ("down", "up")},
        "seconds": {
            **{phase: sum(item["seconds"].get(phase, 0.0) for item in rounds) for phase in _PHASES},
            "total": finished.seconds if finished else None,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def _privacy(experiment: Experiment, events: Sequence[Event]) -> dict[str, Any]:
    statements = [event.privacy for event in events if isinstance(event, SiteReplied) and event.privacy]
    last = statements[-1] if statements else None
    latest = {event.site: event.privacy for event in events if isinstance(event, SiteReplied) and event.privacy}
    config = experiment.privacy
    protected = not isinstance(config, NoPrivacy)
    return {
        "kind": experiment.privacy.kind,
        "unit": last.unit if last else None,
        "relation": last.relation if last else None,
        "accountant": last.accountant if last else None,
        "insecure_seed": not isinstance(config, NoPrivacy) and config.insecure_seed is not None,
        # A reply that never arrived may have been trained for: then only the sites' ledgers know what was spent.
        "at_least": protected and any(event.code in _LOST for event in events if isinstance(event, SiteReplied)),
        # A record lives at one site, so the federation's statement is the worst site's, never a sum.
        "epsilon": max((privacy.epsilon_run for privacy in latest.values()), default=0.0) if protected else None,
        "delta": max((privacy.delta or 0.0 for privacy in latest.values()), default=None) if protected else None,
    }


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
    }


def _final(events: Sequence[Event]) -> dict[str, Any] | None:
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    if not evaluated:
        return None
    first, last = evaluated[0], evaluated[-1]
    return {
        "metric": last.metric,
        "base": first.value if first.round == 0 else None,
        "base_groups": first.groups if first.round == 0 else {},
        "value": last.value,
        "round": last.round,
        "groups": last.groups,
    }
