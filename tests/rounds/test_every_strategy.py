"""Every strategy through the real ServerApp and ClientApp: two rounds at two small sites, and the exported adapter."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conf.compose import compose_experiment, parse_experiment
from conf.schema.experiment import Experiment
from conf.schema.site import SiteFile
from conf.schema.strategy import Strategy
from conf.schema.task import CausalLM
from finetuning.batches import collate
from finetuning.embedded import resolve
from finetuning.memory import rank_that_fits
from finetuning.tasks.base import Quality
from finetuning.tasks.build import build_objective
from server.evaluation import build_evaluator
from simulations import population
from simulations.simulate import Simulated, simulate

KINDS = sorted(variant.model_fields["kind"].default for variant in get_args(get_args(Strategy)[0]))
TINY = (
    "federation.rounds=2",
    "federation.local.steps=2",
    "federation.local.expected_batch_size=8",
    "federation.local.optimizer.learning_rate=1.0",
    "data.max_records=120",
    "data.max_length=48",
    "data.partition={kind:iid,sites:2}",
    "peft.rank=4",
    "evaluation.max_examples=8",
    "evaluation.every=1",
    "logging.progress=none",
)


def run(path: Path, *overrides: str) -> Simulated:
    return simulate(compose_experiment([*TINY, *overrides]), path)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_exports(kind: str, tmp_path: Path) -> None:
    done = run(tmp_path / "run", f"strategy={kind}", "privacy=none")
    summary = done.summary
    assert summary["status"] == "finished"
    assert [len(item["accepted"]) for item in summary["rounds"]] == [2, 2]
    if kind == "fedsa":
        assert summary["final"]["value"] == pytest.approx(summary["final"]["base"]), "A alone computes the base"
    else:
        assert summary["final"]["value"] < summary["final"]["base"]
    assert loss_of_export(done) == pytest.approx(final_loss(summary), rel=1e-5)


@pytest.mark.parametrize("kind", ["ffa_lora", "fedsvd", "flora", "flexlora", "hetlora", "fedsb", "ravan"])
def test_sites_of_different_ranks_train_together(kind: str, tmp_path: Path) -> None:
    all_records = "federation.local.expected_batch_size=40"
    done = run(tmp_path / "run", f"strategy={kind}", "privacy=none", "federation.site_ranks=[4,1]", all_records)
    sites = list(done.summary["sites"].values())
    assert [site["accepted"] for site in sites] == [2, 2]
    assert sites[1]["bytes"]["up"] < sites[0]["bytes"]["up"]
    assert done.summary["final"]["value"] < done.summary["final"]["base"]
    assert loss_of_export(done) == pytest.approx(final_loss(done.summary), rel=1e-5)


@pytest.mark.parametrize("kind", ["flexlora", "hetlora"])
def test_a_site_of_little_memory_trains_what_fits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file says four MiB, its card the rank that this holds, and the server cuts the adapter to it."""
    made = population.site_file

    def little(experiment: Experiment, name: str, *rest: Any) -> SiteFile:
        file = made(experiment, name, *rest)
        return file.model_copy(update={"memory_mib": 4}) if name == "site-2" else file

    monkeypatch.setattr(population, "site_file", little)
    done = run(tmp_path / "run", f"strategy={kind}", "privacy.insecure_seed=1")
    plain, scarce = done.summary["sites"]["site-1"], done.summary["sites"]["site-2"]
    fitting = rank_that_fits("embedded:clinic-base", CausalLM(), 4 << 20)
    assert 1 <= fitting < 4
    assert (plain["accepted"], scarce["accepted"]) == (2, 2)
    assert scarce["bytes"]["up"] == pytest.approx(plain["bytes"]["up"] * fitting / 4, rel=0.3)


def test_ranks_mix_under_client_level_privacy(tmp_path: Path) -> None:
    noise = ("privacy=client_level", "privacy.target_epsilon=null", "privacy.noise_multiplier=1.0")
    mixed = ("strategy=fedsvd", "federation.site_ranks=[4,1]", "evaluation.every=0", "privacy.insecure_seed=1")
    done = run(tmp_path / "run", *mixed, *noise)
    assert [site["accepted"] for site in done.summary["sites"].values()] == [2, 2]


@pytest.mark.parametrize("kind", ["fedsvd", "rolora", "fedsa", "fedrot", "flora", "fedex", "fedsb", "ravan"])
def test_it_trains_privately(kind: str, tmp_path: Path) -> None:
    done = run(tmp_path / "run", f"strategy={kind}", "evaluation.every=0", "privacy.insecure_seed=1")
    assert done.summary["status"] == "finished"
    for site in done.summary["sites"].values():
        assert site["accepted"] == 2
        assert 0 < site["privacy"]["epsilon_run"] <= 8
    stored = load_file(done.path / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


@pytest.mark.parametrize("kind", ["fedsvd", "fedrot"])
def test_it_trains_under_client_level_privacy(kind: str, tmp_path: Path) -> None:
    noise = ("privacy=client_level", "privacy.target_epsilon=null", "privacy.noise_multiplier=1.0")
    done = run(tmp_path / "run", f"strategy={kind}", "evaluation.every=0", *noise, "privacy.insecure_seed=1")
    assert done.summary["status"] == "finished"
    assert done.summary["privacy"]["epsilon"] > 0


def final_loss(summary: dict) -> float:  # type: ignore[type-arg]
    return next(item["evaluation"]["loss"] for item in reversed(summary["rounds"]) if item["evaluation"])


def loss_of_export(done: Simulated) -> float:
    """The held-out loss of what plain PEFT makes of the exported folder."""
    experiment = parse_experiment((done.path / "config.json").read_bytes())
    evaluator = build_evaluator(experiment)
    base = AutoModelForCausalLM.from_pretrained(resolve("embedded:clinic-base"), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, done.path / "adapter").eval()
    objective = build_objective(experiment.task)
    total = Quality()
    with torch.inference_mode():
        for group in evaluator._groups.values():
            for example in group:
                total += objective.quality(theirs, collate([example], evaluator.adapted.base.pad_token_id))
    return total.loss
