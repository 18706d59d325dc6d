"""What may be known of a round whose cohort is secret."""

from __future__ import annotations

import logging
from dataclasses import replace

from server.events import Event, Observer, RoundFinished, RoundStarted, RunFinished, SiteReplied

__all__ = ["discreet"]

_log = logging.getLogger(__name__)


def discreet(observe: Observer) -> Observer:
    """Return an observer that passes on all but who was asked, who replied, and what tells how many these were: a round
    without a cohort waits for nobody, and folding and sending take longer the more there are."""

    def pass_on(event: Event) -> None:
        match event:
            case RoundStarted():
                observe(replace(event, cohort=()))
            case SiteReplied():
                if not event.accepted:
                    # The reason may name the site: the log would tell who was in a secret cohort.
                    _log.warning("round %d: a reply was not used: %s", event.round, event.code)
            case RoundFinished():
                observe(replace(event, accepted=None, rejected=None, train_s=None, aggregate_s=None, other_s=None))
            case RunFinished():
                observe(replace(event, seconds=None))
            case _:
                observe(event)

    return pass_on
