"""What Flower does not take was not sent: each such site has its own event, and the round goes on with the others."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType

from client.app import client_app
from client.site import Site
from conf.compose import compose_experiment
from protocol.errors import FederationError
from server.app import Launch, serve
from simulations.in_process import InProcessGrid
from simulations.population import Population, build_population

from .quick_runs import QUICK

OVERRIDES = (
    *QUICK,
    "data.partition.sites=[eastfield,harbor,millbrook]",
)
SITES = ("eastfield", "harbor", "millbrook")


class Unregistered(InProcessGrid):
    """Some nodes left after enrollment: Flower's HTTP grid answers with an empty identifier for each of their
    messages, and with no identifiers at all where everything is refused."""

    gone: tuple[int, ...] = ()
    forgets_order = False

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        if sent[0].metadata.message_type != MessageType.TRAIN:
            return super().push_messages(sent)
        kept = [message for message in sent if message.metadata.dst_node_id not in self.gone]
        identifiers = iter(super().push_messages(kept))
        if not kept or self.forgets_order:
            return list(identifiers)
        return ["" if message.metadata.dst_node_id in self.gone else next(identifiers) for message in sent]


def run(path: Path, gone: tuple[str, ...], *overrides: str, forgets_order: bool = False) -> list[Any]:
    experiment = compose_experiment((*OVERRIDES, *overrides))
    population = build_population(experiment)
    sites: list[Site] = list(Population(population.parts, ()).sites(experiment, path / "sites").values())

    def site_of(context: Context) -> Site:
        return sites[int(context.node_config["partition-id"])]

    grid = Unregistered(client_app(site_of), [{"partition-id": each} for each in range(len(sites))])
    grid.gone = tuple(node for node, site in enumerate(sites, start=1) if site.file.name in gone)
    grid.forgets_order = forgets_order
    observed: list[Any] = []
    serve(grid, Launch(experiment, path / "run", (observed.append,), (), expected_sites=len(sites)))
    return observed


@pytest.mark.parametrize("mode", [(), ("federation=buffered", "federation.mode.buffer_size=1")])
def test_each_site_that_was_not_asked_has_its_own_event(mode: tuple[str, ...], tmp_path: Path) -> None:
    observed = run(tmp_path, ("eastfield", "millbrook"), *mode, "federation.rounds=2")
    events = [event for event in observed if event.kind == "site_replied"]
    codes = {(each.round, each.site): (each.accepted, each.code, each.bytes_down > 0) for each in events}
    assert len(events) == len(codes) == 6
    for (_, site), found in codes.items():
        assert found == ((True, "", True) if site == "harbor" else (False, "not_sent", False))
    finished = [(event.accepted, event.rejected) for event in observed if event.kind == "round_finished"]
    assert finished == [(1, 2), (1, 2)]


def test_a_request_that_is_too_large_reaches_nobody(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"round 1 has 0 valid replies and 3 others"):
        run(tmp_path, SITES)


def test_identifiers_that_cannot_be_matched_are_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="Flower took 2 of 3 messages and does not say which"):
        run(tmp_path, ("harbor",), forgets_order=True)
