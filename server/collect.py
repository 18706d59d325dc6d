"""Sending instructions and taking replies in one at a time: each is verified before it may be aggregated."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from conf.schema.privacy import adaptive_clipping
from privacy.client_level import update_norm
from protocol.codecs.base import WireContext, value_count
from protocol.codecs.build import build_codec
from protocol.errors import ReplyRejected
from protocol.instructions import Instruction, PrivacyStatement, Reply
from protocol.metrics import check_metric
from protocol.records import instructions_to_records, payload_bytes, record_to_reply
from protocol.tensors import Layout, NamedTensors, check_values
from server.arrivals import Unreadable, arrivals, reading
from server.cohort import Member
from server.events import SiteReplied
from server.sending import NOT_SENT, push_all
from server.statements import checked_statement

__all__ = ["Assignment", "Collected", "Waiting", "accepted", "collect", "judged", "not_sent", "not_used"]

_ROUNDING = 1e-5
"""Relative; a clipped update is rounded to float32. The server takes off what is above before it sums."""


@dataclass(frozen=True)
class Waiting:
    """How time passes while replies are awaited. A simulation has a clock of its own."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Assignment:
    """What a site is asked, and the names, shapes and dtypes of a valid update. Sites may share tensors."""

    instruction: Instruction
    expected: Layout
    start: NamedTensors
    """What the site is sent, decoded."""


@dataclass(frozen=True)
class Collected:
    """How many replies were used, and how the wait was spent. Who could not be asked counts as rejected."""

    accepted: int
    rejected: int
    unused: tuple[str, ...]
    """Sites whose update, if they made one, was not used although they did not refuse: they are told next time."""
    waiting_s: float
    aggregating_s: float


def collect(
    grid: Grid,
    assignments: Mapping[str, Assignment],
    cohort: tuple[Member, ...],
    accept: Callable[[str, Reply, NamedTensors], None],
    observe: Callable[[SiteReplied], None],
    *,
    timeout_s: float,
    pullers: int = 0,
    waiting_by: Waiting | None = None,
) -> Collected:
    """Send each site of the cohort its instruction and hand each verified reply to `accept`, as it arrives.

    A reply that does not verify, a refusal, an error and a missing reply are each observed with a reason, and the
    round goes on without them. Updates are folded one at a time: memory does not grow with the cohort.

    Args:
        grid: Flower's link to the nodes.
        assignments: the round's work by site.
        cohort: whom to ask.
        accept: takes a site's name, its verified reply and the tensors it was sent.
        observe: takes what became of each site's reply.
        timeout_s: how long to wait for all replies together. What comes later is dropped: a round's result must not
            depend on when the next one starts.
        pullers: threads that wait for replies, so that one slow upload does not hold up the others; 0: this thread.
        waiting_by: the clock and the sleep; None: the machine's.
    """
    clock, sleep = (waiting_by or Waiting()).clock, (waiting_by or Waiting()).sleep
    records = instructions_to_records({site: each.instruction for site, each in assignments.items()})
    asked = {site: (each, payload_bytes(records[site])) for site, each in assignments.items()}
    sites = {member.node_id: member.site for member in cohort}
    messages = [Message(records[member.site], member.node_id, MessageType.TRAIN) for member in cohort]
    waiting: dict[str, str] = {}
    counts = {True: 0, False: 0}
    unused: list[str] = []
    for identifier, message in zip(push_all(grid, messages), messages, strict=True):
        site = sites[message.metadata.dst_node_id]
        if identifier is None:
            counts[False] += 1
            observe(not_sent(assignments[site].instruction, site))
        else:
            waiting[identifier] = site
    aggregating, began = 0.0, clock()
    pulled = arrivals(grid, waiting, timeout_s=timeout_s, pullers=pullers, clock=clock, sleep=sleep)
    for identifier, message in pulled:
        site = waiting.pop(identifier)
        assignment, bytes_down = asked[site]
        outcome, reply, refused = judged(message, site, assignment.instruction, assignment.expected, bytes_down)
        if reply is not None:
            folding = clock()
            outcome = accepted(outcome, reply, accept, assignment.start)
            aggregating += clock() - folding
        if not outcome.accepted and not refused:
            unused.append(site)
        counts[outcome.accepted] += 1
        observe(outcome)
    for site in waiting.values():
        counts[False] += 1
        unused.append(site)
        assignment, bytes_down = asked[site]
        reason = f"no reply within {timeout_s:.0f} s; a later one is dropped, and the site is told"
        observe(not_used(assignment.instruction, site, bytes_down, 0, "no_reply", reason))
    return Collected(counts[True], counts[False], tuple(sorted(unused)), clock() - began - aggregating, aggregating)


def accepted(
    outcome: SiteReplied, reply: Reply, accept: Callable[[str, Reply, NamedTensors], None], start: NamedTensors
) -> SiteReplied:
    """Hand a verified reply to `accept`, and return what became of it: the strategy may find something missing."""
    try:
        accept(outcome.site, reply, start)
    except ReplyRejected as problem:
        return replace(outcome, accepted=False, code=problem.code, reason=str(problem))
    return outcome


def judged(
    message: Message | Unreadable, site: str, instruction: Instruction, expected: Layout, bytes_down: int
) -> tuple[SiteReplied, Reply | None, bool]:
    """Return what became of a reply, the reply itself when it may be aggregated, and whether it is a refusal."""
    if isinstance(message, Unreadable):
        return not_used(instruction, site, bytes_down, 0, "malformed_reply", message.reason), None, False
    if message.has_error():
        reason = f"Flower error {message.error.code}"
        return not_used(instruction, site, bytes_down, 0, "flower_error", reason), None, False
    bytes_up, stated, refused = 0, None, False
    try:
        with reading("the reply", "malformed_reply"):
            bytes_up = payload_bytes(message.content)
            reply = record_to_reply(message.content, most_bytes=4 * value_count(expected))
        # The update was seen, so what it cost counts, whether or not it is used.
        stated, refused = checked_statement(reply.header.privacy), reply.header.status == "refused"
        reply = _verified(reply, site, instruction, expected)
    except ReplyRejected as problem:
        return not_used(instruction, site, bytes_down, bytes_up, problem.code, str(problem), stated), None, refused
    header = reply.header
    round_number = instruction.header.round
    return SiteReplied(round_number, site, True, bytes_down, bytes_up, header.privacy, header.metrics), reply, False


def _verified(reply: Reply, site: str, instruction: Instruction, expected: Layout) -> Reply:
    """Return the reply with its update decoded."""
    header, asked = reply.header, instruction.header
    if header.status == "refused":
        raise ReplyRejected(header.code or "refused", header.reason or "the site gave no reason")
    for name, given, wanted in (
        ("site", header.site, site),
        ("round", header.round, asked.round),
        ("plan_digest", header.plan_digest, asked.plan_digest),
        ("base_digest", header.base_digest, asked.base_digest),
        ("adapter_digest", header.adapter_digest, asked.adapter_digest),
    ):
        if given != wanted:
            raise ReplyRejected(f"wrong_{name}", f"the reply answers {name}={given!r}, asked was {wanted!r}")
    if not 1 <= header.steps <= asked.plan.local.steps:
        raise ReplyRejected(
            "wrong_steps", f"the reply states {header.steps} steps, asked were {asked.plan.local.steps} or fewer"
        )
    for name, value in header.metrics.items():
        check_metric(name, value)
    codec = build_codec(asked.plan.quantization)
    context = WireContext(asked.plan.run, asked.round, site, "up")
    decoded = replace(reply, tensors=codec.decode(reply.tensors, expected, context))
    for name, tensor in decoded.tensors.items():
        check_values(name, tensor)
    if asked.clip_norm is not None:
        # What decoding adds to a norm is no fault of the site; the sum takes it off again (`ClippedSum`).
        bound = asked.clip_norm * codec.norm_inflation(value_count(expected))
        _verify_clipped(decoded, bound, adaptive_clipping(asked.plan.privacy))
    return decoded


def _verify_clipped(reply: Reply, bound: float, adaptive: bool) -> None:
    norm = update_norm(reply.tensors)
    if norm > bound * (1 + _ROUNDING):
        raise ReplyRejected(
            "norm_above_clip", f"the update has norm {norm:.6g}, the site was to clip it to {bound:.6g}"
        )
    if adaptive and reply.header.below_clip is None:
        raise ReplyRejected("missing_bit", "the reply does not say whether its norm was below the clip")


def not_sent(instruction: Instruction, site: str) -> SiteReplied:
    """Return the event of an instruction that did not leave: the site spent nothing, and has nothing to be told."""
    return not_used(instruction, site, 0, 0, "not_sent", NOT_SENT)


def not_used(
    instruction: Instruction,
    site: str,
    down: int,
    up: int,
    code: str,
    reason: str,
    stated: PrivacyStatement | None = None,
) -> SiteReplied:
    """Return the event of a reply that is not used, and why."""
    return SiteReplied(instruction.header.round, site, False, down, up, stated, code=code, reason=reason)
