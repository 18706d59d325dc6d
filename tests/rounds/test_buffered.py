"""Buffered aggregation: sites of different speed, simulated time, the real server, the real ledgers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.compose import InvalidConfiguration, compose_experiment
from conf.schema.federation import Buffered
from protocol.instructions import Reply
from protocol.tensors import NamedTensors
from server.buffered import BufferedCollector, staleness_weight
from server.collect import Waiting
from simulations.conditions import SimulatedTime
from simulations.simulate import simulate

SMALL = (
    "experiment=smoke",
    "data.max_records=120",
    "data.max_length=64",
    "federation=buffered",
    "federation.local.expected_batch_size=3",
    "federation.local.steps=1",
    "federation.rounds=6",
    "evaluation.every=0",
    "privacy.insecure_seed=3",
    "runtime.threads=1",
)
# eastfield and harbor answer in a second, millbrook in three, northgate in ten.
DELAYS = "runtime.reply_delays_s=[1,1,3,10]"


def run(path: Path, *overrides: str) -> dict[str, Any]:
    return simulate(compose_experiment([*SMALL, *overrides]), path).summary


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("buffered") / "run"
    return path, run(path, DELAYS)


def replies(path: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["round"], line["site"], line["metrics"]["staleness"]) for line in lines if line["kind"] == "site_replied"
    ]


def test_nobody_waits_for_the_slowest(slow: tuple[Path, dict[str, Any]]) -> None:
    """Two replies a round. At 1 s and 2 s the fast pair fills rounds 1 and 2. At 3 s three replies are due: two make
    round 3, harbor's comes into round 4, which eastfield's ends at 4 s. At 5 s the pair fills round 5; at 6 s millbrook
    (asked at 3 s, in round 4) and eastfield make round 6."""
    taken = replies(slow[0])
    assert taken == [
        (1, "eastfield", 0.0),
        (1, "harbor", 0.0),
        (2, "eastfield", 0.0),
        (2, "harbor", 0.0),
        (3, "millbrook", 2.0),
        (3, "eastfield", 0.0),
        (4, "harbor", 1.0),
        (4, "eastfield", 0.0),
        (5, "eastfield", 0.0),
        (5, "harbor", 0.0),
        (6, "millbrook", 2.0),
        (6, "eastfield", 0.0),
    ]


def test_each_ledger_books_what_its_site_executed(slow: tuple[Path, dict[str, Any]]) -> None:
    sites = slow[1]["sites"]
    executed = {name: site["privacy"]["steps_executed"] for name, site in sites.items() if site["privacy"]}
    assert executed == {"eastfield": 6, "harbor": 4, "millbrook": 2}
    assert sites["northgate"]["privacy"] is None, "asked once, and still at work when the run ends"
    assert all(site["privacy"]["epsilon_run"] <= 8 for site in sites.values() if site["privacy"])


def test_simulated_time_repeats_a_run(slow: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    again = run(tmp_path / "run", DELAYS)
    assert replies(tmp_path / "run") == replies(slow[0])
    # Noise is bound to the run's inputs, and so is what is added up.
    assert again["adapter"]["digest"] == slow[1]["adapter"]["digest"]


def test_replies_that_are_too_old_are_not_used(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", DELAYS, "federation.mode.max_staleness=1")
    rejected = [(item["round"], each["site"], each["code"]) for item in summary["rounds"] for each in item["rejected"]]
    assert rejected[0] == (3, "millbrook", "stale")
    assert all(code == "stale" for _, _, code in rejected)
    assert summary["sites"]["millbrook"]["privacy"]["steps_executed"] >= 1, "it was seen, so it counts"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("privacy=client_level",), "who is in a buffer depends on how fast sites are"),
        (("objective=scaffold",), "with objective=scaffold: what the server keeps for all sites"),
        (("robust=median",), "an attacker that answers fast would fill the buffer"),
        (("federation.mode.buffer_size=3", "federation.cohort_size=2"), "buffer_size=3 is larger than the 2 sites"),
        (("federation.min_replies=3",), "min_replies=3 is larger than federation.mode.buffer_size=2"),
    ],
)
def test_what_a_buffer_cannot_hold(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(InvalidConfiguration, match=problem):
        compose_experiment(["federation=buffered", *overrides])


def test_staleness_weighs_less_and_less() -> None:
    assert [staleness_weight(s) for s in (0, 1, 3, 8)] == pytest.approx([1, 1 / math.sqrt(2), 1 / 2, 1 / 3])


def test_a_stale_update_is_scaled_before_it_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked in round 1, taken in round 4: half of it."""
    from server import buffered

    folded: list[NamedTensors] = []
    reply = Reply(None, {"x": torch.ones(3)})  # type: ignore[arg-type]
    outcome = buffered.SiteReplied(1, "harbor", True, 0, 0)
    monkeypatch.setattr(buffered, "judged", lambda *_: (outcome, reply, False))

    class Instructed:
        instruction = type("Empty", (), {"tensors": {}})()
        expected: Any = None
        start: Any = None

    time = SimulatedTime()
    collector = BufferedCollector(None, Buffered(), 1.0, Waiting(time.now, time.sleep))  # type: ignore[arg-type]
    work = buffered._AtWork("harbor", 1, Instructed(), 0)  # type: ignore[arg-type]
    event, _ = collector._taken(work, None, 4, lambda _site, given, _start: folded.append(given.tensors))  # type: ignore[arg-type]
    assert torch.equal(folded[0]["x"], torch.full((3,), 0.5))
    assert (event.round, event.metrics) == (4, {"staleness": 3.0})
