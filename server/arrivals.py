"""Replies as they arrive, one at a time, until a deadline."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress

from flwr.app import Message
from flwr.serverapp import Grid

__all__ = ["Arrival", "arrivals"]

_POLL_S = 0.2

Arrival = tuple[str, Message]
"""The identifier of a message that was sent, and its reply. A node that died is reported under the SuperLink's own
node id, so replies are matched by message, not by sender."""


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
        yield from _threaded(grid, waiting, timeout_s, min(pullers, len(waiting)))
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
        for message in grid.pull_messages([identifier]):
            return identifier, message
    return None


def _threaded(grid: Grid, waiting: list[str], timeout_s: float, pullers: int) -> Generator[Arrival]:
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    arrived: queue.SimpleQueue[Arrival | Exception | None] = queue.SimpleQueue()  # None: the time is up
    done = threading.Event()
    for identifier in waiting:
        asked.put(identifier)

    def pull() -> None:
        while not done.is_set():
            identifier = None
            with suppress(queue.Empty):
                identifier = asked.get_nowait()
            if identifier is None:
                done.wait(_POLL_S)
                continue
            try:
                found = list(grid.pull_messages([identifier]))
            except Exception as error:
                arrived.put(error)
                return
            if found:
                arrived.put((identifier, found[0]))
            else:
                asked.put(identifier)
                done.wait(_POLL_S)

    # Daemons: one that hangs in an upload must not keep the process alive.
    for number in range(pullers):
        threading.Thread(target=pull, name=f"puller-{number}", daemon=True).start()
    deadline = threading.TIMEOUT_MAX if timeout_s > threading.TIMEOUT_MAX else timeout_s
    timer = threading.Timer(deadline, lambda: arrived.put(None))
    timer.daemon = True
    timer.start()
    try:
        for _ in waiting:
            arrival = arrived.get()
            if arrival is None:
                return
            if isinstance(arrival, Exception):
                raise arrival
            yield arrival
    finally:
        timer.cancel()
        done.set()
