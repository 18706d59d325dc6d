"""What happens during a run, as values: the live display, the log file and the report read nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from protocol.instructions import PrivacyStatement

__all__ = [
    "BestKept",
    "Evaluated",
    "Event",
    "Observer",
    "PersonalEvaluated",
    "RoundFinished",
    "RoundStarted",
    "RunFinished",
    "RunResumed",
    "RunStarted",
    "SiteReplied",
    "StoppedEarly",
    "parse_event",
    "surviving",
]


@dataclass(frozen=True)
class RunStarted:
    """Sites are connected and the initial adapter is ready."""

    run: str
    rounds: int
    sites: tuple[str, ...]
    trained_values: int
    kind: Literal["run_started"] = "run_started"


@dataclass(frozen=True)
class RunResumed:
    """The run goes on after `round`; what was observed of later rounds before does not count."""

    run: str
    round: int
    rounds: int
    sites: tuple[str, ...]
    kind: Literal["run_resumed"] = "run_resumed"


@dataclass(frozen=True)
class RoundStarted:
    """The cohort is drawn; instructions are about to be sent."""

    round: int
    cohort: tuple[str, ...]
    kind: Literal["round_started"] = "round_started"


@dataclass(frozen=True)
class SiteReplied:
    """A reply arrived, or failed to. `code` and `reason` are set when it was not used."""

    round: int
    site: str
    accepted: bool
    bytes_down: int
    bytes_up: int
    privacy: PrivacyStatement | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    code: str = ""
    reason: str = ""
    kind: Literal["site_replied"] = "site_replied"


@dataclass(frozen=True)
class Evaluated:
    """The adapter was measured on held-out records; round 0 is the base itself."""

    round: int
    metric: str
    value: float
    loss: float
    units: int
    groups: dict[str, float]
    figures: dict[str, float] = field(default_factory=dict)
    """Of a classifier: `majority`, `macro_f1`, `calibration_error`; of a language model: `bits_per_byte`."""
    group_figures: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same by group."""
    by_class: dict[str, Any] | None = None
    """Of a classifier after the last round: `classes`, `confusion`."""
    kind: Literal["evaluated"] = "evaluated"


@dataclass(frozen=True)
class RoundFinished:
    """A round's adapter is final. Seconds are wall time at the server. Where cohorts are secret, counts are None, and
    so are the seconds that grow with a cohort: an empty one is not waited for."""

    round: int
    accepted: int | None
    rejected: int | None
    update_norm: float
    train_s: float | None
    aggregate_s: float | None
    evaluate_s: float
    other_s: float | None
    privacy: PrivacyStatement | None = None
    """Client-level: what the run costs so far."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the strategy says of the round's updates."""
    kind: Literal["round_finished"] = "round_finished"


@dataclass(frozen=True)
class BestKept:
    """The adapter of this round is the run's result: the best by public held-out records."""

    round: int
    kind: Literal["best_kept"] = "best_kept"


@dataclass(frozen=True)
class StoppedEarly:
    """The run ends with this round, before its last one."""

    round: int
    reason: str
    kind: Literal["stopped_early"] = "stopped_early"


@dataclass(frozen=True)
class RunFinished:
    """The last adapter is stored."""

    run: str
    seconds: float | None
    """None where cohorts are secret."""
    adapter_digest: str
    kind: Literal["run_finished"] = "run_finished"


@dataclass(frozen=True)
class PersonalEvaluated:
    """In a simulation each site's own model, of which it keeps a part, was measured on that site's held-out records."""

    metric: str
    value: float
    """Over the records of all sites together."""
    groups: dict[str, float]
    kind: Literal["personal_evaluated"] = "personal_evaluated"


Event = (
    BestKept
    | RunStarted
    | RunResumed
    | RoundStarted
    | SiteReplied
    | Evaluated
    | RoundFinished
    | RunFinished
    | StoppedEarly
    | PersonalEvaluated
)
Observer = Callable[[Event], None]

_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def parse_event(line: str | bytes) -> Event:
    """Return the event that a line of `metrics.jsonl` holds.

    Raises:
        ValueError: it holds none.
    """
    return _EVENT.validate_json(line)


def surviving(events: Sequence[Event]) -> list[Event]:
    """Return the events that count: what a resumed run did again is told once."""
    kept: list[Event] = []
    for event in events:
        if isinstance(event, RunStarted):
            kept = []
        elif isinstance(event, RunResumed):
            kept = [each for each in kept if getattr(each, "round", 0) <= event.round]
        kept.append(event)
    return kept
