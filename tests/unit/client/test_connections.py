"""How many connections a site's process holds at once."""

import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client.desk import Desk
from client.listening import Listener
from client.serve import _accept


def test_connections_beyond_the_bound_are_closed_and_later_ones_are_not(
    tmp_path: Path, make_site: Any, small: Any
) -> None:
    path, told = tmp_path / "s.sock", threading.Event()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen(32)
    listener = Listener(listening, path, frozenset({path.stat().st_uid}), None)
    desk = Desk(make_site(small()), lambda: datetime.now(UTC))
    accepting = threading.Thread(target=_accept, args=(listener, desk, 1 << 20, told), daemon=True)
    accepting.start()
    held = [connected(path) for _ in range(8)]
    assert connected(path).recv(1) == b"", "the ninth is closed without a word"
    for each in held:
        each.settimeout(0.05)  # nothing may come meanwhile
        with pytest.raises(TimeoutError):  # those before it stay open
            each.recv(1)
        each.close()
    told.set()
    accepting.join(600)
    assert not accepting.is_alive()
    listener.close()


def connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(600)
    connection.connect(str(path))
    return connection
