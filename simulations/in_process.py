"""Flower's `Grid`, in one process: every message is answered by a ClientApp called like a function.

No server, no sockets, no Ray: sites run one after the other in this process and share the loaded base model. The same
ServerApp and ClientApp run here, on Flower's simulation engine and on a real deployment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["InProcessGrid"]

_RUN_ID = 1


class InProcessGrid(Grid):
    """Nodes 1..n of one process; a message is worked on when its reply is pulled, so that progress shows."""

    def __init__(self, client_app: ClientApp, node_configs: Iterable[Mapping[str, str | int]]) -> None:
        """Create the nodes.

        Args:
            client_app: answers every node's messages.
            node_configs: one configuration per node.
        """
        self._client_app = client_app
        self._contexts = {
            node: Context(run_id=_RUN_ID, node_id=node, node_config=dict(config), state=RecordDict(), run_config={})
            for node, config in enumerate(node_configs, start=1)
        }
        self._queued: dict[str, Message] = {}
        self._sent = 0
        # Flower's messages take their run and sender from this process-wide identity.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, 0, _RUN_ID

    def set_run(self, run: Run) -> None:
        """There is one run per process."""

    @property
    def run(self) -> Run:
        """Return an empty run."""
        return Run.create_empty(_RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message; kept because the interface demands it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages and return their identifiers."""
        identifiers: list[str] = []
        # One deep copy of all: what they share, such as the adapter, is copied once for any number of sites.
        for message in copy.deepcopy(list(messages)):
            self._sent += 1
            identifier = f"message-{self._sent}"
            self._queued[identifier] = message
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Work on the queued messages among `message_ids`, and return the replies."""
        return [self._answered(identifier) for identifier in message_ids if identifier in self._queued]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and return all replies."""
        return self.pull_messages(self.push_messages(messages))

    def _answered(self, identifier: str) -> Message:
        # A ClientApp may change what it is given; the next node must not see that.
        message = copy.deepcopy(self._queued.pop(identifier))
        message.metadata.__dict__["_message_id"] = identifier  # as Flower's own grids do; a reply names it
        node = message.metadata.dst_node_id
        TaskIdentity.node_id = node
        try:
            return self._client_app(message, self._contexts[node])
        except Exception as error:
            # What Flower's own runtimes do with a ClientApp that raises.
            return Message(Error(code=2, reason=type(error).__name__), reply_to=message)
        finally:
            TaskIdentity.node_id = 0
