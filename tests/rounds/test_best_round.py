"""The best round is kept where held-out records are public, and a run that ruins its model ends."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from protocol.tensors import digest
from server.best import best_evaluation, why_it_stops
from server.events import Evaluated
from simulations.simulate import simulate

SMALL = (
    "experiment=smoke",
    "data.max_records=60",
    "data.max_length=64",
    "federation.rounds=8",
    "federation.local.steps=1",
    "federation.local.expected_batch_size=8",
    "evaluation=public",
    "evaluation.max_examples=40",
    "logging.keep_checkpoints=100",
    "runtime.threads=1",
)
DROWNED = (
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=60",
    "privacy.insecure_seed=3",
    "federation.local.optimizer.learning_rate=0.03",
    "evaluation.patience=2",
)
"""So much noise that rounds only get worse."""


def small(*overrides: str) -> Experiment:
    return compose_experiment([*SMALL, *overrides])


def values(path: Path) -> dict[int, float]:
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {event["round"]: event["value"] for event in events if event["kind"] == "evaluated"}


def test_a_run_that_gets_worse_ends_early_with_its_best_round(tmp_path: Path) -> None:
    """The noise drowns everything: the base, or a first lucky round, is never reached again."""
    ran = simulate(small(*DROWNED), tmp_path / "run")
    measured = values(ran.path)
    best = min(measured, key=lambda number: measured[number])
    assert max(measured) == best + 2 < 8
    final = ran.summary["final"]
    assert (final["round"], final["value"], final["best_kept"]) == (best, measured[best], True)
    assert final["value"] <= final["base"]
    assert all(site["privacy"]["steps_executed"] == best + 2 for site in ran.summary["sites"].values())
    assert ran.summary["adapter"]["digest"] == digest(load_file(ran.path / "checkpoints" / "best.safetensors"))
    # A run that was killed before its summary was there is told of what it had come to, and asks nobody.
    (ran.path / "summary.json").unlink()
    again = simulate(small(*DROWNED), ran.path, resume=True)
    for key in ("final", "stopped", "adapter"):
        assert again.summary[key] == ran.summary[key]


def test_private_held_out_records_choose_nothing(tmp_path: Path) -> None:
    ran = simulate(small(*DROWNED, "evaluation.public=false", "federation.rounds=2"), tmp_path / "run")
    final = ran.summary["final"]
    assert (final["round"], final["best_kept"]) == (2, False)
    assert not (ran.path / "checkpoints" / "best.safetensors").exists()


def test_the_best_of_a_run_that_gets_better_is_its_last(tmp_path: Path) -> None:
    ran = simulate(small("privacy=none", "federation.local.optimizer.learning_rate=7"), tmp_path / "run")
    measured = values(ran.path)
    best = min(measured, key=lambda number: measured[number])
    assert best > 4
    stored = load_file(ran.path / "checkpoints" / f"round-{best:05d}.safetensors")
    adapter = {name.removeprefix("adapter/"): each for name, each in stored.items() if name.startswith("adapter/")}
    assert ran.summary["adapter"]["digest"] == digest(adapter)
    assert ran.summary["final"]["value"] == measured[best]


def test_a_stopped_run_remembers_its_best_round(tmp_path: Path) -> None:
    whole = simulate(small(*DROWNED), tmp_path / "whole")
    path = tmp_path / "stopped"

    class Stopped(Exception):
        pass

    def stop(event: object) -> None:
        if isinstance(event, Evaluated) and event.round == 1:
            raise Stopped

    experiment = small(*DROWNED)
    with pytest.raises(Stopped):
        simulate(experiment, path, (stop,))
    again = simulate(experiment, path, resume=True)
    assert again.summary["final"]["round"] == whole.summary["final"]["round"]
    assert again.summary["adapter"]["digest"] == whole.summary["adapter"]["digest"]


@pytest.mark.parametrize("public", [True, False])
def test_a_run_that_ruins_its_model_ends(public: bool, tmp_path: Path) -> None:
    experiment = small("privacy=none", "federation.local.optimizer.learning_rate=400", f"evaluation.public={public}")
    ran = simulate(experiment, tmp_path / "run")
    assert "round 1 left a model far worse than the base" in ran.summary["stopped"]
    assert len(ran.summary["rounds"]) == 1
    assert ran.summary["final"]["round"] == (0 if public else 1)
    page = (ran.path / "report.html").read_text()
    assert "ENDED EARLY" in page
    assert ("NO BETTER THAN THE BASE" in page) != public  # what is kept is the base, and the report says round 0


def evaluated(*measured: float) -> list[Evaluated]:
    return [Evaluated(number, "perplexity", value, 1.0, 9, {}) for number, value in enumerate(measured)]


def test_patience_counts_evaluations_since_the_best() -> None:
    config = small("evaluation.patience=2").evaluation
    for measured, best, stops in (
        ((9.0,), 0, False),
        ((9.0, 8.0, 8.5), 1, False),
        ((9.0, 8.0, 8.5, 8.0), 1, True),
        ((9.0, 8.0, float("nan"), 7.0), 3, False),
        ((9.0, float("nan"), float("inf")), 0, True),
    ):
        found = best_evaluation(evaluated(*measured))
        assert found is not None
        assert (found.round, why_it_stops(config, evaluated(*measured)) is not None) == (best, stops)
    assert best_evaluation([]) is None
    assert why_it_stops(config.model_copy(update={"patience": None}), evaluated(1.0, 2.0, 3.0, 4.0)) is None
