"""The Flower ClientApp: passes a message's bytes to this node's site, and the answer's bytes back.

In a deployment the site is a process of its own (`client/serve.py`), and this one, which a server started, holds no
more than its socket: neither torch nor code that opens records is imported here. Only inside a simulation is the same
site called in process. What goes back when something breaks is a code and its fixed sentence, never an exception's own
text: Flower would send that text, and whatever private value it quotes, to the server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.relay import relay
from protocol.errors import SiteRefusal
from protocol.frames import refusal_record
from protocol.refusals import sentence

if TYPE_CHECKING:
    from client.site import Site

__all__ = ["app", "client_app", "find_site"]

_log = logging.getLogger(__name__)

_NO_SITE = 2
"""Flower's code for a ClientApp that failed."""

_Answer = Callable[[str, Message, Context], RecordDict]


def client_app(find_site: Callable[[Context], Site]) -> ClientApp:
    """Return the ClientApp of a simulation: messages are answered in process, by the site found for a node."""

    def answer(kind: str, message: Message, context: Context) -> RecordDict:
        from client.door import answer_at_door  # imports torch: a relay never comes here

        return answer_at_door(find_site(context), kind, message.content)

    return _flower_app(answer)


def find_site(context: Context) -> Site:
    """Return the simulated site of a node of Flower's simulation engine.

    Raises:
        ConfigError: this is no simulation, or it has no such site.
        SiteRefusal: code `no_site`, when nothing is installed that simulates sites.
    """
    for entry in entry_points(group="cloister.simulated_sites"):
        return entry.load()(context)
    raise SiteRefusal("no_site", sentence("no_site"))


def _flower_app(answer: _Answer) -> ClientApp:
    flower_app = ClientApp()

    @flower_app.query()
    def enroll(message: Message, context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        try:
            return Message(answer("query", message, context), reply_to=message)
        except Exception as error:
            return _unanswered(message, context, error)

    @flower_app.train()
    def train(message: Message, context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        try:
            return Message(answer("train", message, context), reply_to=message)
        except SiteRefusal as refusal:
            _log.error("%s: %s", refusal.code, refusal)
            return Message(refusal_record(refusal.code), reply_to=message)
        except Exception as error:
            return _unanswered(message, context, error)

    return flower_app


def _relayed(kind: str, message: Message, context: Context) -> RecordDict:
    """Return the answer of the site whose socket the node names; a node that names none may be a simulated one."""
    path = context.node_config.get("socket")
    if isinstance(path, str):
        return relay(Path(path), kind, message.content)
    from client.door import answer_at_door

    return answer_at_door(find_site(context), kind, message.content)


def _unanswered(message: Message, context: Context, error: Exception) -> Message:
    """Return the error of a node that cannot answer. Details are in its own log only, unless it is a simulated one."""
    _log.error("this node has no usable site: %s", error)
    if isinstance(error, SiteRefusal):
        reason = f"{error.code}: {sentence(error.code)}"
    else:
        reason = (
            f"{type(error).__name__}; the node's own log says more" if "socket" in context.node_config else str(error)
        )
    return Message(Error(code=_NO_SITE, reason=reason), reply_to=message)


app = _flower_app(_relayed)
