"""Replies as they arrive, one at a time, until a deadline."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from protocol.errors import ReplyRejected

__all__ = ["Arrival", "Pullers", "Unreadable", "arrivals", "pull_one", "reading"]

_POLL_S = 0.2


@dataclass(frozen=True)
class Unreadable:
    """What stands for a reply that Flower cannot put together from what the node uploaded."""

    reason: str


Arrival = tuple[str, Message | Unreadable]
"""The identifier of a message that was sent, and its reply. A node that died is reported under the SuperLink's own
node id, so replies are matched by message, not by sender."""


def pull_one(grid: Grid, identifier: str) -> Message | Unreadable | None:
    """Return the reply to one message; None while there is none.

    A SuperLink compares no more than the heads of what nodes upload, so what a pull raises may be one node's doing, and
    of any type. Whether the link itself still answers tells such a reply, which is that node's loss alone, from a
    SuperLink that is gone, which nobody can go on without.

    Raises:
        Exception: of the pull, when the SuperLink does not answer another question either.
    """
    try:
        return next(iter(grid.pull_messages([identifier])), None)
    except Exception as error:
        if not _answers(grid):
            raise
        return Unreadable(f"Flower cannot read the reply ({type(error).__name__})")


@contextmanager
def reading(what: str, code: str) -> Generator[None]:
    """Turn whatever reading a message raises into its rejection: one node's message ends no run.

    A message may hold any of Flower's objects in place of its records, so no list of exceptions is complete.

    Raises:
        ReplyRejected: with `code`, unless the message was rejected for another reason.
    """
    try:
        yield
    except ReplyRejected:
        raise
    except Exception as error:
        raise ReplyRejected(code, f"{what} cannot be read ({type(error).__name__})") from error


def _answers(grid: Grid) -> bool:
    try:
        list(grid.get_node_ids())
    except Exception:
        return False
    return True


def arrivals(
    grid: Grid,
    identifiers: Iterable[str],
    *,
    timeout_s: float,
    pullers: int,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Generator[Arrival]:
    """Yield the reply to each sent message as it arrives; end when all are there, or after `timeout_s`.

    Flower's pull of a reply lasts as long as its upload, whatever deadline the round has. With `pullers` threads a slow
    upload holds up one of them: the others go on, and the deadline holds.

    A reply that cannot be read is one site's own loss (`pull_one`); what else breaks in a puller is raised.

    Args:
        grid: Flower's link to the nodes.
        identifiers: of the messages sent.
        timeout_s: how long to wait for all of them together.
        pullers: threads; 0 pulls in this thread, as sites that run inside the pull need it.
        clock: seconds.
        sleep: waits that many seconds.
    """
    waiting = list(identifiers)
    if pullers:
        with closing(Pullers(grid, pullers)) as threads:
            threads.ask(waiting)
            yield from threads.until(timeout_s)
        return
    began = clock()
    while waiting and clock() - began < timeout_s:
        arrival = _first(grid, waiting)
        if arrival is None:
            sleep(_POLL_S)
            continue
        waiting.remove(arrival[0])
        yield arrival


def _first(grid: Grid, waiting: Iterable[str]) -> Arrival | None:
    for identifier in waiting:
        reply = pull_one(grid, identifier)
        if reply is not None:
            return identifier, reply
    return None


@dataclass(frozen=True, eq=False)
class _TimeUp:
    """Stands among the arrivals where a deadline was reached; each deadline has its own."""


class Pullers:
    """Threads that wait for replies, for one round or for many: what is pulled after one deadline comes before the next
    one. A slow upload holds up one thread of them."""

    def __init__(self, grid: Grid, count: int) -> None:
        """Start no thread yet: `ask` does, and no more than there are replies to wait for."""
        self._grid, self._count = grid, count
        self._started, self._missing = 0, 0
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[Arrival | Exception | _TimeUp] = queue.SimpleQueue()
        self._done = threading.Event()

    def ask(self, identifiers: Iterable[str]) -> None:
        """Wait for the replies to these messages too."""
        for identifier in identifiers:
            self._missing += 1
            self._asked.put(identifier)
        for number in range(self._started, min(self._count, self._missing)):
            # Daemons: one that hangs in an upload must not keep the process alive.
            threading.Thread(target=self._pull, name=f"puller-{number}", daemon=True).start()
            self._started += 1

    def until(self, timeout_s: float) -> Generator[Arrival]:
        """Yield each reply that was asked for as it arrives; end when all are there, or after `timeout_s`."""
        time_up = _TimeUp()
        timer = threading.Timer(min(timeout_s, threading.TIMEOUT_MAX), lambda: self._arrived.put(time_up))
        timer.daemon = True
        timer.start()
        try:
            while self._missing:
                arrival = self._arrived.get()
                if arrival is time_up:
                    return
                if isinstance(arrival, _TimeUp):
                    continue
                if isinstance(arrival, Exception):
                    raise arrival
                self._missing -= 1
                yield arrival
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the threads that do not hang; what they pull from now on is lost."""
        self._done.set()

    def _pull(self) -> None:
        while not self._done.is_set():
            identifier = None
            with suppress(queue.Empty):
                identifier = self._asked.get_nowait()
            if identifier is None:
                self._done.wait(_POLL_S)
                continue
            try:
                reply = pull_one(self._grid, identifier)
            except Exception as error:
                self._arrived.put(error)
                return
            if reply is not None:
                self._arrived.put((identifier, reply))
            else:
                self._asked.put(identifier)
                self._done.wait(_POLL_S)
