"""Objectives, server optimizers and robust rules in whole rounds: real sites, the real server, the ledgers' books."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client.app import client_app
from client.site import Site
from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from protocol.cards import SiteCard
from protocol.errors import DataError, FederationError
from protocol.instructions import Instruction, Reply, ReplyHeader
from protocol.tensors import NamedTensors
from server.app import Launch, serve
from server.cohort import Member
from server.protection import NoProtection
from simulations.in_process import InProcessGrid
from simulations.population import Population, build_population, site_file
from strategies.base import Contribution

SMALL = (
    "experiment=smoke",
    "data.max_records=120",
    "data.max_length=64",
    "federation.local.expected_batch_size=3",
    "federation.local.optimizer.learning_rate=0.5",
    "federation.local.steps=2",
    "evaluation.max_examples=4",
    "runtime.threads=1",
)
OPEN = (*SMALL, "privacy=none")
PRIVATE = (*SMALL, "privacy.insecure_seed=3", "evaluation.every=0")


@cache
def population() -> Population:
    return build_population(compose_experiment(OPEN))


class Told:
    """An aggregator that keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[Contribution] = []

    def accumulate(self, contribution: Contribution) -> None:
        self.seen.append(contribution)

    def result(self) -> NamedTensors:
        return {}

    def metrics(self) -> dict[str, float]:
        return {}


@dataclass
class Misstating:
    """A site that states another number of steps than it took."""

    site: Site
    steps: int

    def card(self, challenge: bytes = b"") -> SiteCard:
        return self.site.card(challenge)

    def handle(self, instruction: Instruction) -> Reply:
        reply = self.site.handle(instruction)
        return replace(reply, header=reply.header.model_copy(update={"steps": self.steps}))

    def close(self) -> None:
        self.site.close()


def run(
    path: Path,
    *overrides: str,
    caps: dict[str, int] | None = None,
    stated: int | None = None,
    ranks: dict[str, int] | None = None,
) -> Path:
    """Run the federation, some sites with a cap on their steps or a lie about them, and return the run directory."""
    experiment = compose_experiment(overrides)
    sites = {
        name: Site(
            _file(experiment, name, path, (caps or {}).get(name), (ranks or {}).get(name)),
            rows=_rows(name),
            simulated=True,
        )
        for name in population().parts
    }
    nodes: list[Any] = [
        site if stated is None or name != "harbor" else Misstating(site, stated) for name, site in sites.items()
    ]
    app = client_app(lambda context: nodes[int(context.node_config["partition-id"])])
    grid = InProcessGrid(app, [{"partition-id": position} for position in range(len(nodes))])
    try:
        serve(grid, Launch(experiment, path, heldout=population().heldout[:80], expected_sites=len(nodes)))
    finally:
        for site in nodes:
            site.close()
    return path


def _file(experiment: Experiment, name: str, path: Path, cap: int | None, rank: int | None) -> Any:
    rows = population().parts[name]
    file = site_file(experiment, name, len(rows), path / "sites" / name)
    runtime = file.runtime.model_copy(update={"steps_per_round": cap})
    return file.model_copy(update={"runtime": runtime, "trained_rank": rank})


def _rows(name: str) -> Callable[[], Any]:
    return lambda: population().parts[name]


def final(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter" / "adapter_model.safetensors")


def summary(path: Path) -> dict[str, Any]:
    return json.loads((path / "summary.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("plain") / "run", *OPEN)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("private") / "run", *PRIVATE)


@pytest.mark.parametrize(
    "choice",
    [
        ("server_optimizer=fedadam",),
        ("objective=fedprox", "strategy.objective.mu=1.0"),
        ("objective=scaffold",),
        ("objective=feddyn",),
        ("objective=qfedavg", "strategy.objective.q=1", "federation.release_training_loss=true"),
        ("robust=median",),
        ("robust=centered_clipping", "strategy.robust.radius=0.05"),
        ("robust=fltrust", "strategy.robust.root_records=8"),
    ],
    ids=lambda choice: choice[0],
)
def test_a_run_goes_through(choice: tuple[str, ...], tmp_path: Path) -> None:
    made = run(tmp_path / "run", *OPEN, *choice)
    report = summary(made)
    assert report["status"] == "finished"
    assert [item["rejected"] for item in report["rounds"]] == [[], []]
    assert all(torch.isfinite(tensor).all() for tensor in final(made).values())
    assert report["final"]["value"] < report["final"]["base"]


def test_scaffolds_control_variates_come_down_from_round_two(plain: Path, tmp_path: Path) -> None:
    made = run(tmp_path / "run", *OPEN, "objective=scaffold")
    ours, theirs = summary(made)["rounds"], summary(plain)["rounds"]
    assert ours[0]["bytes"]["down"] == pytest.approx(theirs[0]["bytes"]["down"], rel=0.01)
    assert ours[1]["bytes"]["down"] > 1.9 * theirs[1]["bytes"]["down"]
    assert ours[1]["bytes"]["up"] == pytest.approx(theirs[1]["bytes"]["up"], rel=0.01)
    assert len(list((made / "sites").rglob("memory/*/*.safetensors"))) == 2 * len(population().parts)


@pytest.mark.parametrize("choice", ["objective=fedprox", "objective=scaffold", "objective=feddyn", "robust=median"])
def test_the_dp_event_is_the_same_with_and_without(choice: str, private: Path, tmp_path: Path) -> None:
    """Corrections come after the noise and rules after the sites: the books of every site read alike."""
    given = run(tmp_path / "with", *PRIVATE, choice)
    books = [{name: site["privacy"] for name, site in summary(path)["sites"].items()} for path in (private, given)]
    assert books[0] == books[1]
    assert all(book["steps_executed"] == 4 for book in books[0].values())


def test_a_slow_site_takes_and_books_fewer_steps(private: Path, tmp_path: Path) -> None:
    """Its privacy is planned for its own steps: less noise, the same ε."""
    made = summary(run(tmp_path / "run", *PRIVATE, caps={"harbor": 1}))
    privacy = {name: site["privacy"] for name, site in made["sites"].items()}
    assert privacy["harbor"]["steps_executed"] == 2
    assert privacy["northgate"]["steps_executed"] == 4
    uncapped = summary(private)["sites"]["harbor"]["privacy"]
    assert privacy["harbor"]["noise_multiplier"] < uncapped["noise_multiplier"]
    assert 7.5 < privacy["harbor"]["epsilon_run"] <= 8


def test_what_a_site_says_of_its_steps_is_what_the_strategy_is_told() -> None:
    """Rates decay linearly over two rounds, from 0.5; heavy-ball momentum makes more of two steps than of one."""
    decaying = ("federation.local.learning_rate_decay=linear", "federation.local.optimizer.momentum=0.5")
    experiment = compose_experiment([*OPEN, *decaying])
    card = SiteCard(cloister_version="0", site="harbor", published_records=10)
    protection, told = NoProtection(experiment, (Member(1, card),)), Told()
    protection.reserve(2, {}, told)
    for steps in (1, 2):
        header = ReplyHeader(status="trained", site="harbor", round=2, plan_digest="p", steps=steps)
        protection.fold("harbor", Reply(header, {}), {})
    assert [(each.steps, each.learning_rate, each.effective_steps) for each in told.seen] == [
        (1, 0.25, 1.0),
        (2, 0.25, 2.5),
    ]


@pytest.mark.parametrize("steps", [0, 3])
def test_a_reply_of_more_steps_than_asked_or_of_none_is_not_used(steps: int, tmp_path: Path) -> None:
    made = run(tmp_path / "run", *OPEN, "evaluation.every=0", stated=steps)
    rejected = [item for each in summary(made)["rounds"] for item in each["rejected"]]
    assert {(item["site"], item["code"]) for item in rejected} == {("harbor", "wrong_steps")}


def test_a_rule_that_needs_more_sites_than_answer_stops_the_run(tmp_path: Path) -> None:
    """The natural key tells only now that there are four."""
    with pytest.raises(FederationError, match=r"robust=krum needs 5 valid replies in a round, and 4 sites can be"):
        run(tmp_path / "run", *OPEN, "robust=krum")


@pytest.mark.parametrize("choice", ["objective=scaffold", "objective=feddyn", "robust=median"])
def test_a_site_of_a_lower_rank_is_left_out_before_anything_is_sent(choice: str, tmp_path: Path) -> None:
    made = run(tmp_path / "run", *OPEN, "strategy=ffa_lora", choice, "peft.rank=4", ranks={"harbor": 2})
    rounds = summary(made)["rounds"]
    assert all(len(each["accepted"]) == 3 and not each["rejected"] for each in rounds)


def test_where_no_site_has_the_rank_the_run_does_not_start(tmp_path: Path) -> None:
    ranks = dict.fromkeys(population().parts, 2)
    with pytest.raises(FederationError, match=r"robust=median needs .* and no site trains peft.rank=4"):
        run(tmp_path / "run", *OPEN, "strategy=ffa_lora", "robust=median", "peft.rank=4", ranks=ranks)


def test_a_round_with_fewer_replies_than_the_rule_needs_ends_the_run(tmp_path: Path) -> None:
    choice = ("robust=multi_krum", "strategy.robust.attackers=0", "strategy.robust.selected=4")
    with pytest.raises(FederationError, match=r"round 1 has 3 valid replies and 1 others, robust=multi_krum needs 4"):
        run(tmp_path / "run", *OPEN, *choice, stated=99)


def test_fltrust_needs_enough_held_out_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"strategy.robust.root_records=500 public held-out records .* there are 15"):
        run(tmp_path / "run", *OPEN, "robust=fltrust", "strategy.robust.root_records=500")
