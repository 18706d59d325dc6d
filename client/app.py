"""The Flower ClientApp: relays an instruction to this machine's site, and the site's answer back.

Nothing here touches data. What goes back when something breaks is a type and a code, never an exception's own text:
Flower would send that text, and whatever private value it quotes, to the server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client.site import Site, open_site
from protocol.errors import CloisterError, ConfigError, SiteRefusal
from protocol.instructions import Reply, ReplyHeader
from protocol.records import card_to_record, record_to_instruction, reply_to_record

__all__ = ["app", "client_app", "find_site"]

_log = logging.getLogger(__name__)

_NO_SITE = 2
"""Flower's code for a ClientApp that failed."""


def client_app(find_site: Callable[[Context], Site]) -> ClientApp:
    """Return the ClientApp whose messages are answered by the site that `find_site` finds for a node."""
    flower_app = ClientApp()

    @flower_app.query()
    def enroll(message: Message, context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        try:
            card = find_site(context).card()
        except Exception as error:
            return _no_site(message, context, error)
        return Message(card_to_record(card), reply_to=message)

    @flower_app.train()
    def train(message: Message, context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        try:
            site = find_site(context)
        except Exception as error:
            return _no_site(message, context, error)
        return Message(reply_to_record(_handled(site, message)), reply_to=message)

    return flower_app


def find_site(context: Context) -> Site:
    """Return this node's site: from the file that its operator names, or, inside a simulation, a simulated one.

    Raises:
        ConfigError: the node names no site file, and this is no simulation.
    """
    path = context.node_config.get("site")
    if isinstance(path, str):
        return _opened(path)
    for entry in entry_points(group="cloister.simulated_sites"):
        return entry.load()(context)
    raise ConfigError(
        "this node has no site file; start the SuperNode with --node-config 'site=\"/path/to/site.yaml\"'"
    )


def _handled(site: Site, message: Message) -> Reply:
    try:
        return site.handle(record_to_instruction(message.content))
    except SiteRefusal as refusal:
        return _refused(site, refusal.code, str(refusal))
    except CloisterError as error:
        # The message names data or paths, and even its type may tell something of the records: it stays here.
        _log.error("site %s: %s", site.file.name, error)
        return _failure(site)
    except Exception:
        _log.exception("site %s failed", site.file.name)
        return _failure(site)


def _no_site(message: Message, context: Context, error: Exception) -> Message:
    """Return the error of a node that cannot answer. What is wrong with its site file is told in its own log only."""
    _log.error("this node has no usable site: %s", error)
    named = "site" in context.node_config
    reason = f"{type(error).__name__}; the node's own log says more" if named else str(error)
    return Message(Error(code=_NO_SITE, reason=reason), reply_to=message)


@lru_cache(maxsize=1)
def _opened(path: str) -> Site:
    return open_site(Path(path))


def _failure(site: Site) -> Reply:
    """Return the one answer to whatever breaks at a site."""
    return _refused(site, "site_error", "the site could not do it; its own log says why")


def _refused(site: Site, code: str, reason: str) -> Reply:
    return Reply(ReplyHeader(status="refused", site=site.file.name, round=0, plan_digest="", code=code, reason=reason))


app = client_app(find_site)
