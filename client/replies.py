"""The replies that left this site lately, so that one which was lost on its way is sent again as it was.

A stored reply holds what was released and nothing else. It is found by run and round; a question that differs in
anything that the answer depends on is refused, or a server could have one round of a run executed twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from protocol.errors import SiteRefusal
from protocol.instructions import InstructionHeader

__all__ = ["ReplyStore", "question_of"]

_log = logging.getLogger(__name__)
_NOTICES = frozenset({"plan", "unused_rounds", "ledger_heads"})
"""Fields of a header that do not change the answer: the plan counts by its digest, ledgers are asked about heads."""


class ReplyStore:
    """A folder of replies, one file each, of mode 0600."""

    def __init__(self, folder: Path, *, terms: str, keep: int, keep_s: float, clock: Callable[[], float]) -> None:
        """Open the store. Only one process may have it open: what another one left unfinished is removed.

        Args:
            folder: made when missing, of mode 0700.
            terms: digest of what the site agrees to; an answer made under other terms is not sent again.
            keep: the most replies kept.
            keep_s: seconds after which a reply is removed.
            clock: seconds since 1970.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for unfinished in folder.glob(".*"):
            unfinished.unlink()
        self._folder, self._terms = folder, terms
        self._keep, self._keep_s, self._clock = keep, keep_s, clock

    def find(self, header: InstructionHeader) -> bytes | None:
        """Return the stored answer to this instruction under the present terms, or None.

        Raises:
            SiteRefusal: code `replay_mismatch`, when the round was answered for another instruction.
        """
        path = self._path(header)
        if not path.is_file():
            return None
        first, _, body = path.read_bytes().partition(b"\n")
        try:
            stored = json.loads(first)
            whole = stored["body"] == hashlib.sha256(body).hexdigest()
            same = stored["instruction"] == question_of(header)
            in_force = stored["terms"] == self._terms
        except (ValueError, KeyError, TypeError):
            whole = same = in_force = False
        if not whole:
            _log.warning("the stored reply %s is damaged; the round is executed again, with the same noise", path.name)
            return None
        if not same:
            raise SiteRefusal(
                "replay_mismatch",
                f"round {header.round} of run {header.plan.run!r} was answered already, for another instruction",
            )
        if not in_force:
            _log.warning("the stored reply %s was made under another policy or budget; the round is checked anew", path)
            return None
        return body

    def put(self, header: InstructionHeader, body: bytes) -> None:
        """Store an answer durably, and remove what is old. A disk that is full costs a repeated training, no more."""
        first = {"instruction": question_of(header), "terms": self._terms, "body": hashlib.sha256(body).hexdigest()}
        try:
            _write(self._path(header), json.dumps(first).encode() + b"\n" + body)
            self._prune()
        except OSError as error:
            _log.warning("the reply could not be stored: %s", error)

    def _path(self, header: InstructionHeader) -> Path:
        # A hash: the run's name is the server's choice, and may hold anything.
        name = hashlib.sha256(json.dumps([header.plan.run, header.round]).encode()).hexdigest()[:32]
        return self._folder / f"{name}.reply"

    def _prune(self) -> None:
        files = sorted(self._folder.glob("*.reply"), key=lambda path: path.stat().st_mtime, reverse=True)
        oldest = self._clock() - self._keep_s
        for position, path in enumerate(files):
            if position >= self._keep or path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)


def question_of(header: InstructionHeader) -> str:
    """Return a digest (hex) of all that the answer to an instruction depends on."""
    asked = header.model_dump(mode="json", exclude=set(_NOTICES))
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write a file of mode 0600, whole or not at all, on disk when this returns."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
