"""A reply that Flower itself cannot put together is one site's loss, and ends neither the round nor the enrollment.

Every message is taken apart and put together by Flower's own code, as on its way through a SuperLink, which compares
no more than each object's head with what arrived.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body, get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, validate_object_content

from client.app import client_app
from client.site import Site
from conf.compose import compose_experiment
from protocol.errors import FederationError
from server.app import Launch, serve
from server.arrivals import Unreadable, arrivals, pull_one
from server.cohort import enroll
from simulations.in_process import InProcessGrid
from simulations.population import Population, build_population

from .quick_runs import QUICK

LIAR = "harbor"
OVERRIDES = (
    *QUICK,
    f"data.partition.sites=[eastfield,{LIAR}]",
)


class Garbage(ConfigRecord):
    """A record whose head is right and whose body is no protobuf message."""

    def deflate(self) -> bytes:
        return add_header_to_object_body(b"\xff" * 40, self)


Garbage.__qualname__ = "ConfigRecord"  # what a head names


def through_flower(root: Any) -> Message:
    """Return what arrives of an object: its parts are stored by their identifiers, checked, and put together again."""
    contents = {name: each.deflate() for name, each in get_all_nested_objects(root).items()}
    for content in contents.values():
        validate_object_content(content)
    identifier = root.object_id
    inflated = cast(Message, inflate_object_from_contents(identifier, contents))
    inflated.metadata.__dict__["_message_id"] = identifier
    return inflated


def garbage_header(message: Message) -> Message:
    message.content["cloister"] = Garbage({"json": ""})
    return through_flower(message)


def no_message(message: Message) -> Message:
    """What is uploaded under the identifier of a message is a record."""
    return through_flower(message.content)


def array_in_place_of_records(message: Message) -> Message:
    """Flower 1.41 notices, by an exception; what does not must not get further than here."""
    message.__dict__["_content"] = message.content["tensors"]
    return message


Forge = Callable[[Message], Message]


class WireGrid(InProcessGrid):
    """Messages travel in parts; those of one kind from one node are forged."""

    def __init__(self, *given: Any, forge: Forge, kind: str, liar: int) -> None:
        super().__init__(*given)
        self._forge, self._forged = forge, (kind, liar)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._arrived(message) for message in super().pull_messages(message_ids)]

    def _arrived(self, message: Message) -> Message:
        is_forged = (message.metadata.message_type, message.metadata.src_node_id) == self._forged
        return self._forge(message) if is_forged else through_flower(message)


def grid_of(path: Path, forge: Forge, kind: str) -> WireGrid:
    experiment = compose_experiment(OVERRIDES)
    population = build_population(experiment)
    sites: list[Site] = list(Population(population.parts, ()).sites(experiment, path / "sites").values())

    def site_of(context: Context) -> Site:
        return sites[int(context.node_config["partition-id"])]

    liar = next(number for number, site in enumerate(sites, start=1) if site.file.name == LIAR)
    configs = [{"partition-id": each} for each in range(len(sites))]
    return WireGrid(client_app(site_of), configs, forge=forge, kind=kind, liar=liar)


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (garbage_header, "Flower cannot read the reply (DecodeError)"),
        (no_message, "Flower cannot read the reply (AttributeError)"),
        (array_in_place_of_records, "the reply cannot be read (AttributeError)"),
    ],
)
def test_one_sites_garbage_ends_no_round(forge: Forge, reason: str, tmp_path: Path) -> None:
    observed: list[Any] = []
    grid = grid_of(tmp_path, forge, MessageType.TRAIN)
    serve(grid, Launch(compose_experiment(OVERRIDES), tmp_path / "run", (observed.append,), (), expected_sites=2))
    replies = {(each.round, each.site): (each.code, each.reason) for each in observed if each.kind == "site_replied"}
    assert replies == {
        (number, site): ("malformed_reply", reason) if site == LIAR else ("", "")
        for number in (1, 2)
        for site in ("eastfield", LIAR)
    }
    assert observed[-1].kind == "run_finished"


@pytest.mark.parametrize("forge", [garbage_header, array_in_place_of_records])
def test_a_card_that_cannot_be_put_together_does_not_count(
    forge: Forge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = grid_of(tmp_path, forge, MessageType.QUERY)
    assert [member.site for member in enroll(grid, 1, 5)] == ["eastfield"]
    assert "sent no usable card: " in caplog.text
    with pytest.raises(FederationError, match=r"1 of federation.expected_sites=2 sites answered with a card"):
        enroll(grid, 2, float("inf"))


@pytest.mark.parametrize("pullers", [0, 2])
def test_pullers_go_on_after_garbage(pullers: int, tmp_path: Path) -> None:
    grid = grid_of(tmp_path, garbage_header, MessageType.QUERY)
    sent = list(grid.push_messages([Message(RecordDict(), node, MessageType.QUERY) for node in (1, 2, 1)]))
    pulled = dict(arrivals(grid, sent, timeout_s=60, pullers=pullers, clock=lambda: 0.0, sleep=lambda _: None))
    assert pulled.keys() == set(sent)
    assert [isinstance(each, Unreadable) for each in pulled.values()].count(True) == 1


def test_a_link_that_is_gone_is_not_one_sites_loss(tmp_path: Path) -> None:
    class Gone(WireGrid):
        def get_node_ids(self) -> Iterable[int]:
            raise ConnectionError("the SuperLink is gone")

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            raise ConnectionError("the SuperLink is gone")

    grid: Any = Gone(lambda: None, [], forge=no_message, kind="", liar=0)
    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        pull_one(grid, "message-1")
