"""One instruction at a time, with everything that surrounds a round: approval, hours, books, and the stored replies.

The order matters. What the file forbids is refused first; then an answer that already left is repeated, which costs
nothing; only then is it checked whether the site is in a state to spend. An answer that was made under another policy
or budget is not repeated: the round goes through every check of the present ones.

A server that was killed and resumed asks again what it had asked, with other notices perhaps. While the site is still
at work on it, the second question waits and gets the same answer; any other one is told `busy`.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from client.approvals import Approvals
from client.door import ROUND, answer_at_door
from client.health import check_books, check_space
from client.policy import check_moment, check_policy
from client.replies import ReplyStore, question_of
from client.site import Site
from conf.schema.site import SiteFile
from protocol.errors import SiteRefusal
from protocol.frames import decode_frame, encode_frame, refusal_record
from protocol.instructions import Instruction, Reply
from protocol.records import record_to_header, record_to_reply, reply_to_record

__all__ = ["ANSWER", "Desk"]

ANSWER = "answer"
"""The kind of every frame that leaves."""

_log = logging.getLogger(__name__)

_POLL_S = 0.5


class Desk:
    """A site as its own process serves it."""

    def __init__(self, site: Site, clock: Callable[[], datetime]) -> None:
        """Open the desk.

        Args:
            site: what answers.
            clock: aware of its time zone.
        """
        self._site, self._clock = site, clock
        folder, serve = Path(site.file.state_directory), site.file.serve
        self._most_bytes = serve.max_message_mib << 20
        self._approvals = Approvals(folder / "approvals", clock)
        self._replies = ReplyStore(
            folder / "replies",
            terms=_terms(site.file),
            keep=serve.keep_replies,
            keep_s=timedelta(days=serve.keep_replies_days).total_seconds(),
            clock=lambda: clock().timestamp(),
        )
        self._at_work = threading.Lock()
        self._under_way = ""
        """What the latest instruction asked: `question_of` it."""
        self._stopping = threading.Event()

    def answer(self, frame: bytes) -> bytes:
        """Return the frame that answers a frame. Cards are given at any time, instructions are worked on one by one."""
        site = self._site
        try:
            kind, record = decode_frame(frame)
            if kind != ROUND:
                return encode_frame(ANSWER, answer_at_door(site, kind, record))
            self._begin(question_of(record_to_header(record)))
        except SiteRefusal as refusal:
            _log.warning("site %s refuses with %s: %s", site.file.name, refusal.code, refusal)
            return encode_frame(ANSWER, refusal_record(refusal.code, site.file.name))
        try:
            return encode_frame(ANSWER, answer_at_door(site, kind, record, self._handle, self._most_bytes))
        finally:
            self._at_work.release()

    def _begin(self, asked: str) -> None:
        """Take the lock for an instruction, by what it asks; behind one that asks the same, once that is answered."""
        if not self._at_work.acquire(blocking=False):
            if asked != self._under_way:
                raise SiteRefusal("busy", "another instruction is being worked on")
            while not self._at_work.acquire(timeout=_POLL_S):
                if self._stopping.is_set():
                    raise SiteRefusal("stopping", "the process was told to stop")
        self._under_way = asked

    def stop(self, grace_s: float) -> bool:
        """Take no more instructions, wait for the one under way, and return whether none is left."""
        self._stopping.set()
        return self._at_work.acquire(timeout=grace_s)

    def _handle(self, instruction: Instruction) -> Reply:
        header, file = instruction.header, self._site.file
        if self._stopping.is_set():
            raise SiteRefusal("stopping", "the process was told to stop")
        check_policy(file, header, simulated=self._site.work().simulated)
        if file.policy is not None and file.policy.require_approval:
            self._approvals.check(header.plan.digest, header.plan.model_dump(mode="json"))
        stored = self._replies.find(header)
        if stored is not None:
            _log.info("round %d of run %r: the stored reply is sent again", header.round, header.plan.run)
            return record_to_reply(decode_frame(stored)[1])
        now = self._clock()
        check_moment(file, now, header.plan)
        check_space(file)
        check_books(file, now)
        _log.info("round %d of run %r begins", header.round, header.plan.run)
        reply = self._site.handle(instruction)
        if reply.header.status == "trained":
            self._replies.put(header, encode_frame(ANSWER, reply_to_record(reply)))
        return reply


def _terms(file: SiteFile) -> str:
    """Return a digest (hex) of what this site agrees to, and what it may cost."""
    agreed = file.model_dump_json(include={"policy", "budget", "site_budget"})
    return hashlib.sha256(agreed.encode()).hexdigest()
