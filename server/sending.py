"""Handing messages to Flower, which may not take all of them."""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from protocol.errors import FederationError

__all__ = ["NOT_SENT", "push_all"]

NOT_SENT = (
    "Flower did not take the instruction: the site's node is not registered with the SuperLink any more, or the "
    "message is larger than its proxy lets pass"
)


def push_all(grid: Grid, messages: Sequence[Message]) -> list[str | None]:
    """Return each message's identifier, in their order; None for one that Flower did not take.

    Flower answers with an empty identifier for a message that it could not store, and with none at all for a request
    that is too large.

    Raises:
        FederationError: Flower took some and does not say which.
    """
    if not messages:  # a Poisson cohort may be empty
        return []
    identifiers = list(grid.push_messages(messages)) or [""] * len(messages)
    if len(identifiers) != len(messages):
        raise FederationError(
            f"Flower took {len(identifiers)} of {len(messages)} messages and does not say which; restart the "
            "SuperLink, and resume the run"
        )
    return [identifier or None for identifier in identifiers]
