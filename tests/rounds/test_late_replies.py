"""A slow site holds up nobody: the deadline holds, the late update is dropped, and the site is told."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType

from client.app import client_app
from client.site import Site
from conf.compose import compose_experiment
from protocol.errors import FederationError
from protocol.instructions import Instruction
from protocol.records import record_to_instruction
from server.app import Launch, serve
from server.arrivals import Pullers, arrivals
from simulations.in_process import InProcessGrid
from simulations.population import Population, build_population

from .quick_runs import QUICK

SLOW = "eastfield"
OVERRIDES = (
    *QUICK,
    f"data.partition.sites=[{SLOW},harbor]",
)


class Deadline:
    """Stands for `threading.Timer`: time is up when the test says so, and not by any clock."""

    def __init__(self) -> None:
        self._lock, self._running, self._owed = threading.Lock(), list["Deadline.Timer"](), False

    def is_up(self) -> None:
        """Let time be up for what waits, or for the next one that does."""
        with self._lock:
            running, self._running = self._running, []
            self._owed = not running
        for timer in running:
            timer.action()

    class Timer:
        daemon = True

        def __init__(self, owner: "Deadline", action: Callable[[], None]) -> None:
            self.owner, self.action = owner, action

        def start(self) -> None:
            with self.owner._lock:
                owed, self.owner._owed = self.owner._owed, False
                if not owed:
                    self.owner._running.append(self)
            if owed:
                self.action()

        def cancel(self) -> None:
            with self.owner._lock:
                self.owner._running = [each for each in self.owner._running if each is not self]


@pytest.fixture
def deadline(monkeypatch: pytest.MonkeyPatch) -> Deadline:
    made = Deadline()
    monkeypatch.setattr(threading, "Timer", lambda _, action: Deadline.Timer(made, action))
    return made


class SlowUpload(InProcessGrid):
    """One node's first training reply is being uploaded for longer than the round lasts."""

    def __init__(self, *given: Any, slow_node: int, stuck: threading.Event) -> None:
        super().__init__(*given)
        self._slow_node, self._stuck = slow_node, stuck
        self._one_at_a_time = threading.Lock()
        self._slow: set[str] = set()
        self.instructions: list[Instruction] = []
        self.hangs: Callable[[], None] = lambda: None

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        identifiers = list(super().push_messages(sent))
        for identifier, message in zip(identifiers, sent, strict=True):
            if message.metadata.message_type == MessageType.TRAIN and message.metadata.dst_node_id == self._slow_node:
                self.instructions.append(record_to_instruction(message.content))
                if len(self.instructions) == 1:
                    self._slow.add(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        identifiers = list(message_ids)
        if self._slow & set(identifiers):
            # It must not go on to train later: the base model is shared with the tests that come after.
            self.hangs()
            self._stuck.wait()
            return []
        with self._one_at_a_time:
            return list(super().pull_messages(identifiers))


def sites_of(path: Path) -> list[Site]:
    experiment = compose_experiment(OVERRIDES)
    population = build_population(experiment)
    return list(Population(population.parts, ()).sites(experiment, path / "sites").values())


@pytest.fixture
def stuck() -> Iterator[threading.Event]:
    """Keeps an upload from ending before the test does."""
    event = threading.Event()
    yield event
    event.set()


def grid_of(sites: list[Site], stuck: threading.Event) -> SlowUpload:
    def site_of(context: Context) -> Site:
        return sites[int(context.node_config["partition-id"])]

    slow = next(number for number, site in enumerate(sites, start=1) if site.file.name == SLOW)
    configs = [{"partition-id": each} for each in range(len(sites))]
    return SlowUpload(client_app(site_of), configs, slow_node=slow, stuck=stuck)


def test_a_slow_upload_holds_up_nobody_and_its_site_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stuck: threading.Event, deadline: Deadline
) -> None:
    sites = sites_of(tmp_path)
    grid = grid_of(sites, stuck)
    observed: list[Any] = []
    experiment = compose_experiment(OVERRIDES)

    def observe(event: Any) -> None:
        observed.append(event)
        if event.kind == "site_replied" and event.accepted and event.round == 1:
            deadline.is_up()

    launch = Launch(experiment, tmp_path / "run", (observe,), (), expected_sites=2, pullers=2)
    with caplog.at_level(logging.WARNING, logger="client.rounds"):
        serve(grid, launch)
    replies = {(each.round, each.site): (each.accepted, each.code) for each in observed if each.kind == "site_replied"}
    assert replies == {
        (1, "harbor"): (True, ""),
        (1, SLOW): (False, "no_reply"),
        (2, "harbor"): (True, ""),
        (2, SLOW): (True, ""),
    }
    assert [instruction.header.unused_rounds for instruction in grid.instructions] == [(), (1,)]
    assert f"site {SLOW}: the server did not use rounds [1]" in caplog.text


def test_a_slow_upload_holds_up_no_buffer(tmp_path: Path, stuck: threading.Event) -> None:
    """Each round ends with the first reply; the site that hangs is asked once, and never waited for."""
    grid = grid_of(sites_of(tmp_path), stuck)
    observed: list[Any] = []
    experiment = compose_experiment([*OVERRIDES, "federation=buffered", "federation.mode.buffer_size=1"])
    serve(grid, Launch(experiment, tmp_path / "run", (observed.append,), (), expected_sites=2, pullers=2))
    replies = [(each.round, each.site, each.accepted) for each in observed if each.kind == "site_replied"]
    assert replies == [(1, "harbor", True), (2, "harbor", True)]
    assert len(grid.instructions) == 1


def test_what_is_pulled_after_a_deadline_comes_before_the_next_one(stuck: threading.Event, deadline: Deadline) -> None:
    class Slow:
        def pull_messages(self, message_ids: Iterable[str]) -> list[str]:
            (identifier,) = message_ids
            if identifier == "slow":
                stuck.wait()
            return [f"reply to {identifier}"]

    grid: Any = Slow()
    threads = Pullers(grid, 2)
    threads.ask(["slow", "quick"])
    first: list[Any] = []
    for arrival in threads.until(1.0):
        first.append(arrival)
        deadline.is_up()
    assert first == [("quick", "reply to quick")]
    stuck.set()
    threads.ask(["third"])
    assert sorted(threads.until(30.0)) == [("slow", "reply to slow"), ("third", "reply to third")]
    threads.close()


def test_no_valid_reply_at_all_fails_loudly(tmp_path: Path, stuck: threading.Event, deadline: Deadline) -> None:
    sites = [site for site in sites_of(tmp_path) if site.file.name == SLOW]
    grid, experiment = grid_of(sites, stuck), compose_experiment(OVERRIDES)
    grid.hangs = deadline.is_up
    launch = Launch(experiment, tmp_path / "run", (), (), expected_sites=1, pullers=1)
    with pytest.raises(FederationError, match=r"round 1 has 0 valid replies and 1 others, federation.min_replies=1"):
        serve(grid, launch)
    assert not (tmp_path / "run" / "adapter").exists()


def test_what_breaks_in_a_puller_is_raised_and_no_thread_outlives_the_round() -> None:
    class Broken:
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            raise ConnectionError("the SuperLink is gone")

    before = set(threading.enumerate())
    grid: Any = Broken()
    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        list(arrivals(grid, ["a", "b"], timeout_s=30, pullers=2, clock=lambda: 0.0, sleep=lambda _: None))

    class Silent:
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return []

    grid = Silent()
    assert list(arrivals(grid, ["a"], timeout_s=0.05, pullers=1, clock=lambda: 0.0, sleep=lambda _: None)) == []
    for thread in set(threading.enumerate()) - before:
        thread.join(600)
        assert not thread.is_alive()
