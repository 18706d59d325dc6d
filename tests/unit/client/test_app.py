"""What a node that cannot answer tells the server."""

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message, MessageType, RecordDict

from client.app import client_app, find_site
from client.site import Site
from protocol.errors import ConfigError
from simulations.in_process import InProcessGrid

KINDS = (MessageType.QUERY, MessageType.TRAIN)


def ask(kind: str, node_config: dict[str, str | int], find: Callable[..., Site] = find_site) -> Message:
    (reply,) = InProcessGrid(client_app(find), [node_config]).send_and_receive([Message(RecordDict(), 1, kind)])
    return reply


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_site_file_a_node_says_what_to_do(kind: str) -> None:
    reply = ask(kind, {"partition-id": 0})

    assert reply.has_error()
    assert reply.error.reason.startswith("this node has no site file; start the SuperNode with --node-config")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["name: [patient", "name: harbor\npatient: Mr Miller\n", "- Mr Miller\n"])
def test_what_is_wrong_with_a_site_file_stays_at_the_site(
    kind: str, content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(content)
    reply = ask(kind, {"site": str(path)})

    assert reply.has_error()
    assert reply.error.reason == "ConfigError; the node's own log says more"
    assert "this node has no usable site: site file" in caplog.text
    assert str(path) in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_that_names_too_high_a_place_in_a_simulation_says_how_many_sites_there_are(kind: str) -> None:
    def find(_: object) -> Site:
        raise ConfigError("Flower simulates node 5, the experiment has 4 sites")

    assert ask(kind, {"partition-id": 4}, find).error.reason == "Flower simulates node 5, the experiment has 4 sites"
