"""The other end of the site's socket: hands a message's bytes over, and the answer's bytes back.

Runs inside Flower's processes, where a server's wishes arrive. It imports neither torch nor anything that could open a
record: what it can reach is the socket.
"""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

from flwr.app import RecordDict

from protocol.errors import SiteRefusal
from protocol.frames import ALIVE, decode_frame, encode_frame, receive_frame, send_frame

__all__ = ["relay"]

_log = logging.getLogger(__name__)

_CONNECT_S, _SILENCE_S = 5.0, 60.0
"""A site that is at work says so every few seconds (`client.serve`); after this long without a word it hangs."""
_MAX_REPLY = 1 << 34


def relay(path: Path, kind: str, record: RecordDict, *, silence_s: float = _SILENCE_S) -> RecordDict:
    """Return a site's answer to a message.

    Args:
        path: of the site's socket, or of the file that names its loopback port and token.
        kind: Flower's name of the message's kind.
        record: what the server sent.
        silence_s: how long the site may say nothing.

    Raises:
        SiteRefusal: `site_down`, `site_silent`, or what is wrong with the message.
    """
    frame = encode_frame(kind, record)
    try:
        with _connected(path) as connection:
            connection.settimeout(silence_s)
            send_frame(connection, frame)
            while (answer := receive_frame(connection, _MAX_REPLY)) == ALIVE:
                pass
    except TimeoutError as error:
        raise SiteRefusal("site_silent", f"the site at {path} said nothing for {silence_s:g} s") from error
    except (OSError, ValueError) as error:
        raise SiteRefusal("site_down", f"the site at {path} does not answer: {error}") from error
    if answer is None:
        raise SiteRefusal("site_down", f"the site at {path} ended before it answered")
    return decode_frame(answer)[1]


def _connected(path: Path) -> socket.socket:
    """Return a connection. Where a file takes the socket's place, the token in it is sent first."""
    if path.is_file():
        address = json.loads(path.read_text())
        connection = socket.create_connection(("127.0.0.1", int(address["port"])), timeout=_CONNECT_S)
        send_frame(connection, str(address["token"]).encode())
        return connection
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_CONNECT_S)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection
