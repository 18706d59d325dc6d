"""The site's own process: holds data, ledger, model, policy and keys, and answers on a local socket.

The SuperNode beside it runs what a server sends; all that can do is write a frame to this socket. Reading order:
`serve` opens everything and accepts connections until it is told to stop; `_converse` answers one connection.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from client.desk import ANSWER, Desk
from client.health import check_books, check_space
from client.listening import Listener, open_listener
from client.site import Site
from conf.schema.model import Model
from conf.schema.site import SiteFile
from finetuning.models import load_base
from privacy.ledger import load_or_create_keys
from protocol.errors import ConfigError, PrivacyError, SiteRefusal
from protocol.frames import ALIVE, encode_frame, receive_frame, refusal_record, send_frame

__all__ = ["serve"]

_log = logging.getLogger(__name__)

_POLL_S, _ALIVE_S, _READ_S, _SEND_S = 0.5, 10.0, 60.0, 5.0
"""How often a stop is looked for, an asker is told that work goes on, how long an asker may stall, also at a stop."""


_MOST_CONVERSATIONS = 8
"""At once. Each may hold a message of `serve.max_message_mib`, and only one instruction is worked on."""


def serve(file: SiteFile, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
    """Serve a site until SIGTERM or SIGINT.

    A stop lets the round under way finish for `serve.stop_grace_s`; after that it is abandoned, and what it had
    reserved in the ledger stays spent.

    Raises:
        ConfigError: another process serves this state directory, or the socket cannot be made.
        ModelError: the base cannot be loaded.
    """
    with _alone(Path(file.state_directory)):
        base = load_base(Model(path=file.model_path), file.task, file.runtime.device)
        _log.info("site %s: base %s is loaded", file.name, base.digest)
        _report_health(file, clock())
        desk, listener, told = Desk(Site(file), clock), open_listener(file), threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: told.set())
        _log.info("site %s listens at %s", file.name, listener.path)
        try:
            conversations = _accept(listener, desk, file.serve.max_message_mib << 20, told)
        finally:
            listener.close()
        _log.info("site %s stops", file.name)
        if not desk.stop(file.serve.stop_grace_s):
            _log.warning("site %s: the round under way is abandoned; what it reserved counts as spent", file.name)
        else:
            for conversation in conversations:
                conversation.join(_SEND_S)  # its answer may still be on its way
    logging.shutdown()
    os._exit(0)  # a thread that still trains must not be torn down with the interpreter


def _accept(listener: Listener, desk: Desk, limit: int, told: threading.Event) -> list[threading.Thread]:
    """Give each connection a thread until `told` to stop, and return the threads that are left. More are closed."""
    conversations: list[threading.Thread] = []
    listener.socket.settimeout(_POLL_S)
    while not told.is_set():
        try:
            connection, _ = listener.socket.accept()
        except TimeoutError:
            continue
        conversations = [each for each in conversations if each.is_alive()]
        if len(conversations) >= _MOST_CONVERSATIONS:
            _log.warning("a connection was turned away: %d are open already", len(conversations))
            connection.close()
            continue
        conversations.append(threading.Thread(target=_converse, args=(connection, listener, desk, limit), daemon=True))
        conversations[-1].start()
    return conversations


def _converse(connection: socket.socket, listener: Listener, desk: Desk, limit: int) -> None:
    """Read one frame, answer it, and say in between that work goes on. The work ends even if nobody waits for it."""
    with connection, suppress(OSError):
        connection.settimeout(_READ_S)
        try:
            if not listener.admits(connection):
                _log.warning("a connection was turned away: not this site's user, or without its token")
                return
            frame = receive_frame(connection, limit)
        except SiteRefusal as refusal:
            _log.warning("refused with %s: %s", refusal.code, refusal)
            send_frame(connection, encode_frame(ANSWER, refusal_record(refusal.code)))
            return
        if frame is None:
            return
        answers: list[bytes] = []
        work = threading.Thread(target=lambda: answers.append(desk.answer(frame)), daemon=True)
        work.start()
        while work.join(_ALIVE_S) or work.is_alive():
            send_frame(connection, ALIVE)
        for answer in answers:
            send_frame(connection, answer)


def _report_health(file: SiteFile, now: datetime) -> None:
    """Say at the start what every instruction would be refused for."""
    try:
        check_space(file)
        _log.info("site %s: %d entries in the ledger", file.name, check_books(file, now))
    except SiteRefusal as refusal:
        _log.error("site %s will refuse every round with %s: %s", file.name, refusal.code, refusal)
    try:
        key = load_or_create_keys(Path(file.state_directory)).signing.verifying.to_hex()
        _log.info("site %s: its card is signed by the key %s (federation.site_keys)", file.name, key)
    except PrivacyError as error:
        _log.error("site %s will refuse every round, for its keys: %s", file.name, error)
    if file.policy is None:
        _log.error("site %s will refuse every round with no_policy", file.name)


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Hold the lock of a state directory; the system releases it when this process ends, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "serve.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process serves {folder}; end it first, or give this site a state_directory of its own"
            ) from error
        yield
