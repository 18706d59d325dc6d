"""A server reminds each site of where its ledger ended, so that a site which came out of an old backup notices.

Everything of such a site is of one age: ledger, head and keys agree, and only the server knows that there was more.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client.app import client_app
from client.site import Site
from conf.compose import compose_experiment
from privacy.ledger.store import Store
from protocol.cards import SiteCard
from protocol.instructions import Instruction, Reply
from server.app import Launch, serve
from server.events import Event, RoundStarted
from simulations.in_process import InProcessGrid
from simulations.population import Population, build_population

SITES = ("eastfield", "harbor")
OLD = "harbor"
OVERRIDES = (
    "experiment=smoke",
    "privacy.insecure_seed=5",
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=1.0",
    "data.max_records=60",
    "data.max_length=64",
    "federation.rounds=4",
    "federation.local.steps=1",
    "federation.local.expected_batch_size=8",  # an empty draw, whose update is zero, is as good as impossible
    f"data.partition.sites=[{','.join(SITES)}]",
    "evaluation.every=0",
    "runtime.threads=1",
)


@dataclass
class Kept:
    """A real site that may be put back to an older copy of its whole folder before a round."""

    site: Site
    backup_before: int = 0
    restore_before: int = 0
    asked: dict[int, Instruction] = field(default_factory=dict)
    answered: dict[int, Reply] = field(default_factory=dict)

    def card(self, challenge: bytes = b"") -> SiteCard:
        return self.site.card(challenge)

    @property
    def file(self) -> Any:
        return self.site.file

    def handle(self, instruction: Instruction) -> Reply:
        number = instruction.header.round
        folder = Path(self.site.file.state_directory)
        backup = folder.with_name(f"{folder.name}.backup")
        if number == self.backup_before:
            self.site.close()
            shutil.copytree(folder, backup)
            self.site = Site(self.site.file, rows=self.site._read, simulated=True)
        if number == self.restore_before:
            self.site.close()
            shutil.rmtree(folder)
            shutil.copytree(backup, folder)
            self.site = Site(self.site.file, rows=self.site._read, simulated=True)
        self.asked[number] = instruction
        self.answered[number] = self.site.handle(instruction)
        return self.answered[number]


class Killed(BaseException):
    """Ends a run without a word."""


Run = Callable[..., dict[str, Kept]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs all four rounds, or goes on with them."""
    experiment = compose_experiment(OVERRIDES)
    population = build_population(experiment)
    path = tmp_path / "run"

    def start(*, killed_in: int = 0, resume: bool = False, **moments: int) -> dict[str, Kept]:
        opened = Population(population.parts, ()).sites(experiment, tmp_path / "sites")
        sites = {name: Kept(site, **(moments if name == OLD else {})) for name, site in opened.items()}
        nodes = list(sites.values())
        app = client_app(lambda context: nodes[int(context.node_config["partition-id"])])  # type: ignore[arg-type, return-value]
        grid = InProcessGrid(app, [{"partition-id": position} for position in range(len(nodes))])

        def observe(event: Event) -> None:
            if isinstance(event, RoundStarted) and event.round == killed_in:
                raise Killed

        try:
            serve(grid, Launch(experiment, path, (observe,), (), expected_sites=len(nodes), resume=resume))
        except Killed:
            assert killed_in
        for each in nodes:
            each.site.close()
        return sites

    return start


def told(sites: dict[str, Kept], name: str) -> dict[int, dict[str, str]]:
    return {number: dict(asked.header.ledger_heads) for number, asked in sites[name].asked.items()}


def stated(sites: dict[str, Kept], name: str) -> dict[int, dict[str, str]]:
    return {number: dict(reply.header.ledger_heads) for number, reply in sites[name].answered.items()}


def test_each_site_is_reminded_of_its_own_ledgers_end_also_after_a_resume(run: Run) -> None:
    before = run(killed_in=3)
    after = run(resume=True)
    for name in SITES:
        assert told(before, name)[1] == {}
        assert told(before, name)[2] == stated(before, name)[1]
        assert told(after, name)[3] == stated(before, name)[2]
        assert told(after, name)[4] == stated(after, name)[3]
        said = [*stated(before, name).values(), *stated(after, name).values()]
        assert len({each["records"] for each in said}) == 4
    assert told(after, SITES[0])[4] != told(after, SITES[1])[4]


def refused(tmp_path: Path) -> list[tuple[int, str, str]]:
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    return [(each["round"], no["site"], no["code"]) for each in summary["rounds"] for no in each["rejected"]]


def test_a_site_that_is_older_than_what_the_server_has_seen_refuses(run: Run, tmp_path: Path) -> None:
    run(backup_before=2, restore_before=3)
    assert refused(tmp_path) == [(3, OLD, "ledger_set_back"), (4, OLD, "ledger_set_back")]
    assert booked(tmp_path, OLD) == ["reserve", "commit"], "of the first round, and nothing more"


def booked(tmp_path: Path, name: str) -> list[str]:
    store = Store(tmp_path / "sites" / name / "ledger.db", read_only=True)
    kinds = [entry.kind for entry in store.snapshot().entries]
    store.close()
    return [kind for kind in kinds if kind in ("reserve", "commit")]


def test_so_does_one_that_was_put_back_while_the_server_was_down(run: Run, tmp_path: Path) -> None:
    run(killed_in=3, backup_before=2)
    sites = run(resume=True, restore_before=3)
    assert refused(tmp_path) == [(3, OLD, "ledger_set_back"), (4, OLD, "ledger_set_back")]
    assert sorted(sites[OLD].answered) == [3, 4]
