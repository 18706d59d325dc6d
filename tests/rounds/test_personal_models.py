"""FedSA's sites have a model each: a simulation measures those, and nobody else could."""

import json
from pathlib import Path

import pytest

from cli.tables import outcome_table, sweep_table
from conf.compose import compose_experiment
from finetuning.checkpoints import load_tensors
from server.evaluation import Evaluator
from server.report import render_report
from simulations.simulate import Simulated, simulate
from simulations.study_cells import Labels, compose_cell, run_cells

SMOKE = (
    "experiment=smoke",
    "strategy=fedsa",
    "privacy=none",
    "federation.local.steps=4",
    "federation.local.optimizer.learning_rate=0.1",
    "logging.progress=none",
    "runtime.threads=1",
)
SITES = {"eastfield", "harbor", "millbrook", "northgate"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    return simulate(compose_experiment(SMOKE), tmp_path_factory.mktemp("fedsa") / "run")


def test_each_sites_own_model_is_better_than_the_base(done: Simulated) -> None:
    final = done.summary["final"]
    assert final["value"] == pytest.approx(final["base"]), "the server's half computes the base"
    assert final["personal"]["value"] < 0.99 * final["base"]
    assert final["personal"]["groups"].keys() == SITES
    for site, value in final["personal"]["groups"].items():
        assert value < final["base_groups"][site], site


def test_a_run_whose_personal_evaluation_failed_is_resumed_with_it(
    done: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as broken:

        def fail(*_: object) -> None:
            raise MemoryError("no room for the sites' own models")

        broken.setattr(Evaluator, "evaluate_each", fail)
        with pytest.raises(MemoryError):
            simulate(compose_experiment(SMOKE), path)
    assert json.loads((path / "summary.json").read_text())["status"] == "failed"
    resumed = simulate(compose_experiment(SMOKE), path, resume=True).summary
    assert resumed["status"] == "finished"
    assert resumed["final"] == done.summary["final"]
    kinds = [json.loads(line)["kind"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert kinds[-2:] == ["run_finished", "personal_evaluated"]
    assert "run_resumed" not in kinds


def test_what_a_site_keeps_is_not_at_the_server(done: Simulated) -> None:
    """The figure comes from the sites' own files; without them it is the base's."""
    kept = sorted((done.path / "sites").glob("*/memory/*/*.safetensors"))
    assert {path.parents[2].name for path in kept} == SITES
    newest = sorted((done.path / "checkpoints").glob("*.safetensors"))[-1]
    stored = {name: tensor for name, tensor in load_tensors(newest)[0].items() if "lora_B" in name}
    assert stored
    assert not any(bool(tensor.any()) for tensor in stored.values())
    assert all(bool(tensor.any()) for path in kept for tensor in load_tensors(path)[0].values())


def test_people_are_told_whose_model_it_is(done: Simulated) -> None:
    from rich.console import Console

    shown = f"{done.summary['final']['personal']['value']:.2f}"
    console = Console(width=160, record=True)
    console.print(outcome_table(done.summary), sweep_table([(("strategy=fedsa",), done.summary)]))
    text = console.export_text()
    assert text.count(shown) == 2
    assert "each site's own model" in text
    page = render_report(done.summary, compose_experiment(SMOKE))
    assert "could not be drawn" not in page
    assert "on held-out text, each site&#39;s own model" in page
    assert "with what each site keeps, its own model" in page
    kinds = [json.loads(line)["kind"] for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    assert kinds[-1] == "personal_evaluated"


@pytest.mark.rare
def test_a_study_compares_what_sites_use(tmp_path: Path) -> None:
    labels = Labels("which", "clinics", "fedsa", "none", "", float("inf"), "own", 0, 0.5, 0)
    (line,) = run_cells([compose_cell(labels, SMOKE[:-2])], tmp_path, lambda line: None)
    final = json.loads(next(tmp_path.glob("runs/*/summary.json")).read_text())["final"]
    assert line.quality == final["personal"]["value"]
    assert line.quality_of == final["personal"]["groups"]


def test_sites_without_records_of_their_own_are_measured_on_all(tmp_path: Path) -> None:
    overrides = (*SMOKE, "data.partition={kind:iid,sites:2}", "evaluation.max_examples=16")
    final = simulate(compose_experiment(overrides), tmp_path / "run").summary["final"]
    assert final["personal"]["groups"].keys() == {"site-1", "site-2"}
    assert final["personal"]["value"] < final["base"]


def test_a_strategy_of_one_model_has_no_other(tmp_path: Path) -> None:
    overrides = ("experiment=smoke", "strategy=rolora", "privacy=none", "evaluation.max_examples=8")
    assert simulate(compose_experiment(overrides), tmp_path / "run").summary["final"]["personal"] is None
