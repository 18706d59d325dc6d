"""The same two apps on every runtime give the same adapter. Deployed ones are compared in `organizations`."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from protocol.errors import ConfigError, FederationError
from server.app import Launch
from simulations.population import build_population
from simulations.ray_engine import run_on_ray
from simulations.simulate import simulate

pytestmark = [pytest.mark.slow, pytest.mark.deployment]

SITES = ("eastfield", "harbor")
OVERRIDES = (
    "experiment=smoke",
    f"data.partition.sites=[{','.join(SITES)}]",
    f"federation.expected_sites={len(SITES)}",
    "federation.reply_timeout_s=1800",
    "privacy.insecure_seed=7",
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=1.0",
    "runtime.threads=1",
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the same experiment, in one process."""
    path = tmp_path_factory.mktemp("reference") / "run"
    simulate(compose_experiment(OVERRIDES), path)
    return path


def experiment_in(path: Path, *overrides: str) -> Experiment:
    return compose_experiment((*OVERRIDES, f"logging.directory={path}", *overrides))


def summary_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "summary.json").read_text())


def assert_same_result(path: Path, reference: Path) -> None:
    ours, expected = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (path, reference))
    assert ours.keys() == expected.keys()
    assert any(tensor.abs().max() > 1e-3 for name, tensor in expected.items() if "lora_B" in name)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            ours[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert summary_of(path)["status"] == "finished"
    assert [sorted(item["accepted"]) for item in summary_of(path)["rounds"]] == [list(SITES)] * 2
    assert summary_of(path)["privacy"]["epsilon"] == pytest.approx(summary_of(reference)["privacy"]["epsilon"])


def test_flowers_engine_started_by_cloister_agrees(tmp_path: Path, reference: Path) -> None:
    events: list[str] = []
    path = tmp_path / "run"
    simulate(experiment_in(path, "runtime=ray"), path, (lambda event: events.append(event.kind),))

    assert_same_result(path, reference)
    assert events[0] == "run_started"
    assert events[-1] == "run_finished"
    assert sorted(folder.name for folder in (path / "sites").iterdir()) == list(SITES)
    assert all((path / "sites" / site / "ledger.db").is_file() for site in SITES)


@pytest.mark.rare
def test_what_the_server_app_raises_on_flowers_engine_is_raised_here(tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path / "run", "runtime=ray", "federation.reply_timeout_s=1", "evaluation.every=0")
    launch = Launch(experiment, tmp_path / "run", expected_sites=3)
    with pytest.raises(
        FederationError, match=r"\d of federation.expected_sites=3 sites answered with a card within 1 s"
    ):
        run_on_ray(launch, build_population(experiment))

    assert summary_of(tmp_path / "run")["status"] == "failed"
    assert not ray.is_initialized()


@pytest.mark.parametrize(("setting", "kind"), [("cpus_per_site", "CPU"), ("gpus_per_site", "GPU")])
def test_a_site_that_no_machine_can_hold_is_refused(setting: str, kind: str, tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path / "run", "runtime=ray", f"runtime.{setting}=1024")
    with pytest.raises(ConfigError, match=rf"runtime.{setting}=1024 is above the \d+ {kind}s of this machine"):
        run_on_ray(Launch(experiment, tmp_path / "run"), build_population(experiment))

    assert not (tmp_path / "run").exists()
    assert not ray.is_initialized()


def test_plain_flwr_run_agrees(tmp_path: Path, reference: Path, flower: Any) -> None:
    path = tmp_path / "run"
    flower.flwr_run("simulation", {"experiment": experiment_in(path).canonical_json()})
    assert (path / "summary.json").is_file(), flower.logs()
    assert_same_result(path, reference)


@pytest.mark.rare
def test_flwr_run_on_two_nodes_does_not_train_two_of_four_sites(tmp_path: Path, flower: Any) -> None:
    path = tmp_path / "run"
    experiment = compose_experiment(("experiment=smoke", "evaluation.every=0", f"logging.directory={path}"))
    flower.flwr_run("simulation", {"experiment": experiment.canonical_json()})

    said = "Flower simulates 2 nodes, the experiment has 4 sites; start it with: flwr run . --federation-config"
    assert f'{said} "num-supernodes=4"' in flower.log("simulation"), flower.logs()
    assert not path.exists()
    assert not flower.cloister_home.joinpath("simulated_sites").exists()


@pytest.mark.rare
def test_a_node_without_a_site_takes_no_part(tmp_path: Path, flower: Any) -> None:
    private = tmp_path / "private.jsonl"
    private.write_text('{"prompt": "Patient", "completion": " has nothing to hide."}\n')
    path = tmp_path / "run"
    experiment = compose_experiment(
        (
            "experiment=smoke",
            "data=jsonl_prompt_completion",
            f"data.source.path={private}",
            "evaluation.every=0",
            "federation.reply_timeout_s=30",
            f"logging.directory={path}",
        )
    )
    flower.start_supernode("node", flower.start_superlink())
    flower.flwr_run("deployment", {"experiment": experiment.canonical_json()})

    assert (path / "summary.json").is_file(), flower.logs()
    summary = summary_of(path)
    assert summary["status"] == "failed"
    assert "0 of federation.expected_sites=1 sites answered with a card" in summary["error"]
    assert not (path / "adapter").exists()
    assert "this node has no site" in flower.log("node")
    assert "this node has no site" in flower.log("deployment")
    assert not flower.cloister_home.joinpath("simulated_sites").exists()
