"""The apps of the deployment's bench: a ServerApp that times messages, and the least ClientApp that Flower can run.

Flower's own processes import this module. It needs nothing but Flower, so what an echo takes is Flower's floor.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

__all__ = ["echo", "echo_app", "server_app", "time_messages"]

_POLL_S = 0.05

echo_app, server_app = ClientApp(), ServerApp()


@echo_app.train()
def echo(message: Message, context: Context) -> Message:
    """Return what was sent."""
    return Message(message.content, reply_to=message)


@server_app.main()
def time_messages(grid: Grid, context: Context) -> None:
    """Send the frames that the run config names to the one node, and write the seconds that each took."""
    from protocol.frames import decode_frame  # an echo does without

    while not (nodes := list(grid.get_node_ids())):
        time.sleep(_POLL_S)
    took: list[dict[str, float]] = []
    for path in json.loads(str(context.run_config["frames"])):
        record = decode_frame(Path(path).read_bytes())[1]
        began = time.perf_counter()
        (identifier,) = grid.push_messages([Message(record, nodes[-1], MessageType.TRAIN)])
        pushed = time.perf_counter()
        while not (replies := list(grid.pull_messages([identifier]))):
            time.sleep(_POLL_S)
        took.append({"push_s": pushed - began, "whole_s": time.perf_counter() - began})
        if replies[0].has_error():
            raise RuntimeError(replies[0].error.reason)
    out = Path(str(context.run_config["out"]))
    out.with_suffix(".partial").write_text(json.dumps(took))
    out.with_suffix(".partial").replace(out)
