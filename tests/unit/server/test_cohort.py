"""Enrollment and cohorts: who is asked, and what is said when too few or the wrong ones are there."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import client_app
from client.site import Site
from conf.compose import compose_experiment
from conf.schema.site import SiteFile
from protocol.cards import SiteCard
from protocol.errors import FederationError
from server.cohort import Member, draw_cohort, enroll, weights_of
from simulations.in_process import InProcessGrid

Times = Mapping[int, float]
"""Seconds by node."""
AT_ONCE: Times = MappingProxyType({})


def members(*names: str) -> tuple[Member, ...]:
    return tuple(
        Member(node, SiteCard(cloister_version="0", site=name, published_records=100 * node))
        for node, name in enumerate(names, start=1)
    )


def site(name: str, tmp_path: Path) -> Site:
    data = compose_experiment().data
    return Site(
        SiteFile(name=name, published_records=10, data=data, model_path="m", state_directory=str(tmp_path / name))
    )


def grid_of(tmp_path: Path, *names: str) -> InProcessGrid:
    sites = [site(name, tmp_path) for name in names]
    return InProcessGrid(
        client_app(lambda context: sites[context.node_config["n"]]), [{"n": n} for n in range(len(names))]
    )


def test_enrollment_sorts_sites_by_name(tmp_path: Path) -> None:
    found = enroll(grid_of(tmp_path, "north", "east", "south"), 3, 10)
    assert [member.site for member in found] == ["east", "north", "south"]
    assert [member.node_id for member in found] == [2, 1, 3]


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class LateGrid(InProcessGrid):
    """Each node connects, answers and leaves at its own time."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        *names: str,
        connects: Times = AT_ONCE,
        answers: Times = AT_ONCE,
        leaves: Times = AT_ONCE,
    ) -> None:
        sites = [site(name, path) for name in names]
        super().__init__(
            client_app(lambda context: sites[context.node_config["n"]]), [{"n": n} for n in range(len(names))]
        )
        self.clock, self.connects, self.answers, self.leaves = clock, connects, answers, leaves
        self.asked: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        now = self.clock()
        return [
            node
            for node in super().get_node_ids()
            if self.connects.get(node, 0) <= now < self.leaves.get(node, math.inf)
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.asked += [message.metadata.dst_node_id for message in messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [
            name
            for name in message_ids
            if self.answers.get(self.asked[int(name.removeprefix("message-")) - 1], 0) <= self.clock()
        ]
        return super().pull_messages(ready)


def names_enrolled(grid: LateGrid, expected: int, timeout_s: float) -> list[str]:
    found = enroll(grid, expected, timeout_s, clock=grid.clock, sleep=grid.clock.sleep)
    return [member.site for member in found]


def test_a_second_node_with_a_name_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid = grid_of(tmp_path, "north", "north", "south")
    assert [(each.site, each.node_id) for each in enroll(grid, 2, 10)] == [("north", 1), ("south", 3)]
    assert "nodes [1, 2] call themselves 'north', and node 1 takes part" in caplog.text


class Impostor(Site):
    """Gives the name of another site, and the card that this one once gave to somebody else."""

    overheard: SiteCard

    def card(self, challenge: bytes = b"") -> SiteCard:
        return self.overheard


def test_under_a_known_key_a_name_is_its_owners_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    owner, other = site("north", tmp_path), site("north", tmp_path / "other")
    replayed, unsigned = Impostor(other.file), Impostor(other.file)
    replayed.overheard = owner.card(b"another server's question")
    unsigned.overheard = SiteCard(cloister_version="0", site="north", published_records=9)
    sites = [replayed, unsigned, other, owner]
    grid = InProcessGrid(client_app(lambda context: sites[context.node_config["n"]]), [{"n": n} for n in range(4)])

    (member,) = enroll(grid, 1, 10, keys={"north": owner.card().key})

    assert (member.node_id, member.card.key) == (4, owner.card().key)
    assert "node 1 sent no usable card: it calls itself 'north', and its signature is not of its key" in caplog.text
    assert f"node 2 sent no usable card: it calls itself 'north', whose key is {owner.card().key}" in caplog.text
    assert f"and its own is {other.card().key}; find out whose it is. A site with new keys wants" in caplog.text


def test_without_its_owner_nobody_takes_part_under_a_known_key(tmp_path: Path) -> None:
    owner = site("north", tmp_path)
    grid = LateGrid(tmp_path / "others", Clock(), "north", "south")
    with pytest.raises(FederationError, match=r"sites of this run have not connected within 5 s: north"):
        enroll(grid, 1, 5, names=("north",), keys={"north": owner.card().key}, clock=grid.clock, sleep=grid.clock.sleep)


def test_every_node_is_asked_with_a_challenge_of_its_own(tmp_path: Path) -> None:
    asked: list[int] = []

    def challenge(size: int) -> bytes:
        asked.append(size)
        return bytes([len(asked)]) * size

    found = enroll(grid_of(tmp_path, "north", "south"), 2, 10, challenge=challenge)
    assert asked == [32, 32]
    assert all(member.card.signature for member in found)


def test_a_node_that_was_passed_over_takes_part_when_the_first_leaves(tmp_path: Path) -> None:
    grid = LateGrid(tmp_path, Clock(), "north", "north", "south", leaves={1: 5.0}, connects={3: 20.0})
    found = enroll(grid, 2, 100, clock=grid.clock, sleep=grid.clock.sleep)
    assert [(each.site, each.node_id) for each in found] == [("north", 2), ("south", 3)]


def test_cards_are_counted_not_nodes_and_who_comes_later_is_asked_too(tmp_path: Path) -> None:
    grid = LateGrid(tmp_path, Clock(), "north", "south", connects={2: 40.0}, answers={2: 47.0})
    assert names_enrolled(grid, 2, 100) == ["north", "south"]
    assert grid.clock() == 47.0
    assert grid.asked == [1, 2]


def test_a_hung_node_costs_a_moment_not_the_timeout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid = LateGrid(tmp_path, Clock(), "north", "south", "west", answers={2: math.inf, 3: 10.0})
    assert names_enrolled(grid, 1, 3600) == ["north", "west"]
    assert grid.clock() == 15.0
    assert "node 2 has not sent its card; the run starts without it" in caplog.text


def test_when_everybody_has_answered_nobody_is_waited_for(tmp_path: Path) -> None:
    grid = LateGrid(tmp_path, Clock(), "north", "south")
    assert names_enrolled(grid, 1, 3600) == ["north", "south"]
    assert grid.clock() == 0.0


def test_too_few_cards_are_said_after_the_deadline_not_waited_for_forever(tmp_path: Path) -> None:
    grid = LateGrid(tmp_path, Clock(), "north", "south", answers={2: math.inf})
    with pytest.raises(
        FederationError,
        match=r"1 of federation.expected_sites=2 sites answered with a card within 5 s, nodes connected: 2; "
        "start the missing SuperNodes, or lower federation.expected_sites",
    ):
        names_enrolled(grid, 2, 5)
    assert grid.clock() == 5.0


def test_who_left_before_the_start_is_out(tmp_path: Path) -> None:
    grid = LateGrid(tmp_path, Clock(), "north", "south", "south", connects={3: 30.0}, leaves={2: 20.0})
    assert names_enrolled(grid, 2, 3600) == ["north", "south"]
    grid = LateGrid(tmp_path, Clock(), "north", "south", leaves={1: 20.0}, answers={2: 30.0})
    with pytest.raises(FederationError, match=r"1 of federation.expected_sites=2"):
        names_enrolled(grid, 2, 60)


def test_a_node_without_a_card_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sites = [site("north", tmp_path)]
    grid = InProcessGrid(client_app(lambda context: sites[context.node_config["n"]]), [{"n": 0}, {"n": 1}])
    with pytest.raises(FederationError, match=r"1 of federation.expected_sites=2 sites answered with a card"):
        enroll(grid, 2, math.inf)
    assert "node 2 sent no card: list index out of range" in caplog.text


def test_a_card_that_cannot_be_read_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = ClientApp()

    @app.query()
    def card(message: Message, _: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    with pytest.raises(FederationError, match=r"0 of federation.expected_sites=1"):
        enroll(InProcessGrid(app, [{}]), 1, math.inf)
    assert "node 1 sent no usable card: the message has no JSON header" in caplog.text


def test_everybody_is_the_default_cohort() -> None:
    everybody = members("a", "b", "c")
    assert draw_cohort(everybody, None, 0, 1) == everybody


def test_cohorts_follow_seed_and_round_and_are_sorted() -> None:
    everybody = members(*"abcdefgh")
    drawn = [draw_cohort(everybody, 3, 7, number) for number in range(1, 30)]
    assert drawn == [draw_cohort(everybody, 3, 7, number) for number in range(1, 30)]
    assert len(set(drawn)) > 10
    assert all(list(cohort) == sorted(cohort, key=lambda member: member.site) for cohort in drawn)
    assert {member.site for cohort in drawn for member in cohort} == set("abcdefgh")
    assert all(len({member.site for member in cohort}) == 3 for cohort in drawn)


def test_a_cohort_larger_than_the_population() -> None:
    with pytest.raises(FederationError, match=r"federation.cohort_size=4 is larger than the population of 3 sites"):
        draw_cohort(members("a", "b", "c"), 4, 0, 1)


def test_weights_are_public() -> None:
    assert weights_of(members("a", "b"), "uniform") == {"a": 1.0, "b": 1.0}
    assert weights_of(members("a", "b"), "published_records") == {"a": 100.0, "b": 200.0}
