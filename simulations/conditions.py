"""The conditions of a simulated federation: sites that take their time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

__all__ = ["DelayedGrid", "SimulatedTime"]


class SimulatedTime:
    """A clock that moves when somebody sleeps, and only then: a run takes no longer for it, and repeats exactly."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def now(self) -> float:
        """Return the seconds since the start."""
        return self._seconds

    def sleep(self, seconds: float) -> None:
        """Let that much time pass."""
        self._seconds += seconds


class DelayedGrid(Grid):
    """Another grid, whose n-th node's answers to training are there some simulated seconds after it was asked."""

    def __init__(self, inner: Grid, delays_s: Sequence[float], time: SimulatedTime) -> None:
        """Slow a grid down.

        Args:
            inner: works on a message when its reply is pulled.
            delays_s: of node 1, 2, ...; from the start again when there are more nodes.
            time: what `delays_s` are measured by.
        """
        self._inner, self._delays_s, self._time = inner, tuple(delays_s), time
        self._ready_at: dict[str, float] = {}

    def set_run(self, run: Run) -> None:
        """Leave it to the inner grid."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """Return the inner grid's run."""
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the inner grid's nodes."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass messages on, and note when their replies are due."""
        given = list(messages)
        identifiers = list(self._inner.push_messages(given))
        for identifier, message in zip(identifiers, given, strict=True):
            slow = message.metadata.message_type.startswith("train")
            delay = self._delays_s[(message.metadata.dst_node_id - 1) % len(self._delays_s)] if slow else 0.0
            self._ready_at[identifier] = self._time.now() + delay
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are due."""
        due = [each for each in message_ids if self._ready_at.get(each, 0.0) <= self._time.now()]
        return self._inner.pull_messages(due)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages, let the time pass that the slowest takes, and return all replies."""
        identifiers = list(self.push_messages(messages))
        self._time.sleep(max((self._ready_at[each] - self._time.now() for each in identifiers), default=0.0))
        return self.pull_messages(identifiers)
