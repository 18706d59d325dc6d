"""Enrollment and cohorts: who is asked, and what is said when too few or the wrong ones are there."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Message

from client.app import client_app
from client.site import Site
from conf.compose import compose_experiment
from conf.schema.site import SiteFile
from protocol.errors import FederationError
from protocol.instructions import SiteCard
from server.cohort import Member, draw_cohort, enroll, weights_of
from simulations.in_process import InProcessGrid


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


def test_two_nodes_cannot_have_one_name(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="two nodes call themselves 'north'"):
        enroll(grid_of(tmp_path, "north", "north"), 2, 10)


def test_too_few_nodes_is_said_after_the_deadline_not_waited_for_forever(tmp_path: Path) -> None:
    now = iter(range(100))
    waited: list[float] = []
    with pytest.raises(FederationError, match=r"1 of federation.expected_sites=2 sites connected within 5 s"):
        enroll(grid_of(tmp_path, "north"), 2, 5, clock=lambda: float(next(now)), sleep=waited.append)
    assert waited


class _DeafGrid(InProcessGrid):
    """Its second node does not answer."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return list(super().send_and_receive(list(messages)[:1]))


def test_a_node_without_a_card_does_not_count(tmp_path: Path) -> None:
    sites = [site(name, tmp_path) for name in ("north", "south")]
    grid = _DeafGrid(client_app(lambda context: sites[context.node_config["n"]]), [{"n": 0}, {"n": 1}])
    with pytest.raises(FederationError, match=r"1 of federation.expected_sites=2 sites answered with a card"):
        enroll(grid, 2, 10)


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
