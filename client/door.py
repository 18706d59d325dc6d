"""A site's door as messages come to it: decode, hand over, and let nothing out but a reply, a card or a code."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import RecordDict

from client.site import Site
from protocol.errors import CloisterError, SiteRefusal
from protocol.frames import refusal_record
from protocol.instructions import Instruction, Reply
from protocol.records import (
    LARGEST_MESSAGE,
    card_to_record,
    record_to_challenge,
    record_to_instruction,
    reply_to_record,
)

__all__ = ["CARD", "ROUND", "answer_at_door"]

CARD, ROUND = "query", "train"
"""The two kinds of messages, by Flower's names."""

_log = logging.getLogger(__name__)


def answer_at_door(
    site: Site,
    kind: str,
    record: RecordDict,
    handle: Callable[[Instruction], Reply] | None = None,
    most_bytes: int = LARGEST_MESSAGE,
) -> RecordDict:
    """Return the record that answers a message; whatever breaks becomes a refusal's code.

    Args:
        site: whose door it is.
        kind: `CARD` or `ROUND`; anything else is refused.
        record: what the server sent.
        handle: answers a decoded instruction; the site's own `handle` unless given.
        most_bytes: what sparse tensors of an instruction may grow to.
    """
    try:
        if kind == CARD:
            return card_to_record(site.card(record_to_challenge(record)))
        if kind != ROUND:
            raise SiteRefusal("malformed_instruction", f"a message of kind {kind!r} is neither {CARD} nor {ROUND}")
        return reply_to_record((handle or site.handle)(record_to_instruction(record, most_bytes)))
    except SiteRefusal as refusal:
        _log.warning("site %s refuses with %s: %s", site.file.name, refusal.code, refusal)
        return refusal_record(refusal.code, site.file.name)
    except CloisterError as error:
        # The message names data or paths, and even its type may tell something of the records: it stays here.
        _log.error("site %s: %s", site.file.name, error)
    except Exception:
        _log.exception("site %s failed", site.file.name)
    return refusal_record("site_error", site.file.name)
