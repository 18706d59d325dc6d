"""Who is waited for: a whole cohort, or the first few of everybody who is at work (FedBuff).

Nguyen et al. 2022, arXiv 2106.06639, algorithm 1. A round is one step of the server. It ends when `buffer_size` valid
replies are there, whichever rounds their sites were asked in; the others go on working, and their replies come into a
later round's buffer. A reply of a site that was asked s rounds ago enters as Δ / √(1 + s).

Each instruction carries the round in which it is sent, so a site's ledger books under that round what it executed. No
site is asked twice in one round: it would answer the second instruction with the first one's bits, as a replay. So a
fast site waits for the round to end, takes part in `rounds` rounds at most, and its plan's schedule holds. What is
still at work when the last round ends is executed and booked, and not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, assert_never

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from conf.schema.federation import Buffered, Mode, Synchronous
from protocol.instructions import Reply
from protocol.records import instructions_to_records, payload_bytes
from protocol.tensors import NamedTensors
from server.arrivals import Arrival, Pullers, Unreadable, arrivals
from server.cohort import Member
from server.collect import Assignment, Collected, Waiting, accepted, collect, judged, not_sent, not_used
from server.events import SiteReplied
from server.sending import push_all

__all__ = ["BufferedCollector", "Collector", "collector_for", "staleness_weight"]

Accept = Callable[[str, Reply, NamedTensors], None]
Observe = Callable[[SiteReplied], None]


class Collector(Protocol):
    """Sends instructions and takes replies in, round after round."""

    def collect(
        self,
        round_number: int,
        assignments: Mapping[str, Assignment],
        cohort: tuple[Member, ...],
        accept: Accept,
        observe: Observe,
    ) -> Collected:
        """Ask the cohort, hand verified replies to `accept`, and return when the round may end."""
        ...

    def close(self) -> None:
        """Wait for nobody any more."""
        ...


def collector_for(
    mode: Mode, grid: Grid, timeout_s: float, pullers: int = 0, waiting: Waiting | None = None
) -> Collector:
    """Return how a run collects replies, with that many threads that wait for them; 0: the caller's."""
    match mode:
        case Synchronous():
            return _CohortCollector(grid, timeout_s, pullers, waiting)
        case Buffered():
            return BufferedCollector(grid, mode, timeout_s, waiting or Waiting(), pullers)
        case _:
            assert_never(mode)


def staleness_weight(staleness: int) -> float:
    """Return 1 / √(1 + s), for s rounds that ended since a site was asked."""
    return 1 / math.sqrt(1 + staleness)


@dataclass(frozen=True)
class _CohortCollector:
    """Waits for everybody who was asked."""

    grid: Grid
    timeout_s: float
    pullers: int
    waiting: Waiting | None

    def collect(
        self,
        round_number: int,
        assignments: Mapping[str, Assignment],
        cohort: tuple[Member, ...],
        accept: Accept,
        observe: Observe,
    ) -> Collected:
        """See `server.collect.collect`."""
        return collect(
            self.grid,
            assignments,
            cohort,
            accept,
            observe,
            timeout_s=self.timeout_s,
            pullers=self.pullers,
            waiting_by=self.waiting,
        )

    def close(self) -> None:
        """Nothing outlives a round."""


@dataclass(frozen=True)
class _AtWork:
    site: str
    round: int
    assignment: Assignment
    bytes_down: int


class BufferedCollector:
    """Waits for `buffer_size` valid replies; who is still at work stays so."""

    def __init__(self, grid: Grid, mode: Buffered, timeout_s: float, waiting: Waiting, pullers: int = 0) -> None:
        """With `pullers` threads, which outlive a round: what one pulls after its end belongs to the next."""
        self._grid, self._mode, self._timeout_s, self._waiting = grid, mode, timeout_s, waiting
        self._at_work: dict[str, _AtWork] = {}
        self._pullers = Pullers(grid, pullers) if pullers else None

    def collect(
        self,
        round_number: int,
        assignments: Mapping[str, Assignment],
        cohort: tuple[Member, ...],
        accept: Accept,
        observe: Observe,
    ) -> Collected:
        """Ask the sites of the cohort that are not at work, and take replies in until the buffer is full, nobody is at
        work, or the time is up."""
        counts, aggregating, clock = {True: 0, False: 0}, 0.0, self._waiting.clock
        for site in self._ask(round_number, assignments, cohort):
            counts[False] += 1
            observe(not_sent(assignments[site].instruction, site))
        again: list[str] = []
        began = clock()
        for identifier, message in self._arrivals():
            work, folding = self._at_work.pop(identifier), clock()
            outcome, refused = self._taken(work, message, round_number, accept)
            aggregating += clock() - folding
            counts[outcome.accepted] += 1
            if not outcome.accepted and not refused and work.round == round_number:
                again.append(work.site)
            observe(outcome)
            if counts[True] == self._mode.buffer_size:
                break
        waited = clock() - began - aggregating
        return Collected(counts[True], counts[False], tuple(sorted(again)), waited, aggregating)

    def close(self) -> None:
        """End the threads; who is still at work is not waited for."""
        if self._pullers is not None:
            self._pullers.close()

    def _arrivals(self) -> Iterable[Arrival]:
        if self._pullers is not None:
            return self._pullers.until(self._timeout_s)
        clock, sleep = self._waiting.clock, self._waiting.sleep
        return arrivals(self._grid, self._at_work, timeout_s=self._timeout_s, pullers=0, clock=clock, sleep=sleep)

    def _ask(
        self, round_number: int, assignments: Mapping[str, Assignment], cohort: tuple[Member, ...]
    ) -> tuple[str, ...]:
        """Send the idle sites of the cohort their work, and return those whose instruction did not leave."""
        busy = {work.site for work in self._at_work.values()}
        idle = [member for member in cohort if member.site not in busy]
        sent = instructions_to_records({each.site: assignments[each.site].instruction for each in idle})
        messages = [Message(sent[each.site], each.node_id, MessageType.TRAIN) for each in idle]
        pushed = dict(zip((member.site for member in idle), push_all(self._grid, messages), strict=True))
        asked = {identifier: site for site, identifier in pushed.items() if identifier is not None}
        for identifier, site in asked.items():
            down = payload_bytes(sent[site])
            self._at_work[identifier] = _AtWork(site, round_number, assignments[site], down)
        if self._pullers is not None:
            self._pullers.ask(asked)
        return tuple(site for site, identifier in pushed.items() if identifier is None)

    def _taken(
        self, work: _AtWork, message: Message | Unreadable, round_number: int, accept: Accept
    ) -> tuple[SiteReplied, bool]:
        """Return what became of a reply, as an event of the round that it came into, and whether it is a refusal."""
        instruction, staleness = work.assignment.instruction, round_number - work.round
        outcome, reply, refused = judged(message, work.site, instruction, work.assignment.expected, work.bytes_down)
        if reply is not None and staleness > self._mode.max_staleness:
            outcome = not_used(
                instruction,
                work.site,
                work.bytes_down,
                outcome.bytes_up,
                "stale",
                f"asked {staleness} rounds ago, federation.mode.max_staleness={self._mode.max_staleness}",
                outcome.privacy,
            )
        elif reply is not None:
            weight = staleness_weight(staleness)
            scaled = {name: tensor * weight for name, tensor in reply.tensors.items()}
            outcome = accepted(outcome, replace(reply, tensors=scaled), accept, work.assignment.start)
        shown = replace(outcome, round=round_number, metrics={**outcome.metrics, "staleness": float(staleness)})
        return shown, refused
