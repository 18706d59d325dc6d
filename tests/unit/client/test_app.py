"""What a node that cannot answer tells the server, and that a relay holds nothing but a socket."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message, MessageType, RecordDict

import client.app
from client.app import client_app, find_site
from client.site import Site
from protocol.errors import ConfigError
from protocol.records import challenge_to_record, record_to_reply
from protocol.refusals import sentence
from simulations.in_process import InProcessGrid

KINDS = (MessageType.QUERY, MessageType.TRAIN)


def ask(kind: str, node_config: dict[str, str | int], find: Callable[..., Site] = find_site) -> Message:
    (reply,) = InProcessGrid(client_app(find), [node_config]).send_and_receive([Message(RecordDict(), 1, kind)])
    return reply


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_site_a_node_says_what_to_do(kind: str) -> None:
    reply = ask(kind, {"partition-id": 0})

    assert reply.has_error()
    assert reply.error.reason == "this node has no site; start it with: cloister site start --config site.yaml"


def test_a_site_that_is_down_is_a_code_and_nothing_of_the_path(tmp_path: Path) -> None:
    app_of = InProcessGrid(client.app.app, [{"socket": str(tmp_path / "patient.sock")}])
    (card,) = app_of.send_and_receive([Message(challenge_to_record(bytes(32)), 1, MessageType.QUERY)])
    assert card.error.reason == "site_down: this node's site process does not answer"

    (trained,) = app_of.send_and_receive([Message(RecordDict(), 1, MessageType.TRAIN)])
    header = record_to_reply(trained.content).header
    assert (header.status, header.code) == ("refused", "site_down")
    assert header.reason == sentence("site_down")


def test_a_relay_imports_neither_torch_nor_what_opens_records(tmp_path: Path) -> None:
    """With a message relayed: what is imported late counts too."""
    program = f"""
import socket, sys, threading
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from client.app import app
from protocol.frames import encode_frame, receive_frame, refusal_record, send_frame
listening = socket.socket(socket.AF_UNIX); listening.bind({str(tmp_path / "s")!r}); listening.listen()
def answer():
    connection, _ = listening.accept()
    receive_frame(connection, 1 << 20)
    send_frame(connection, b"")
    send_frame(connection, encode_frame("answer", refusal_record("busy", "harbor")))
threading.Thread(target=answer).start()
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
message = Message(RecordDict(), 1, "train")
message.metadata.__dict__["_message_id"] = "m"
node = {{"socket": {str(tmp_path / "s")!r}}}
context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={{}})
print(app(message, context).content["cloister"]["json"])
banned = ("torch", "transformers", "peft", "opacus", "datasets", "client.site", "finetuning", "privacy", "sqlalchemy")
print([name for name in banned if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reply, imported = done.stdout.splitlines()
    assert '"code": "busy"' in reply
    assert imported == "[]"


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_that_names_too_high_a_place_in_a_simulation_says_how_many_sites_there_are(kind: str) -> None:
    def find(_: object) -> Site:
        raise ConfigError("Flower simulates node 5, the experiment has 4 sites")

    assert ask(kind, {"partition-id": 4}, find).error.reason == "Flower simulates node 5, the experiment has 4 sites"
