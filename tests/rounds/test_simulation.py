"""A whole simulation through the real ServerApp and ClientApp: what it achieves, what it leaves, what it keeps."""

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.compose import compose_experiment, parse_experiment
from conf.schema.experiment import Experiment
from finetuning.embedded import resolve
from server.events import Event, RoundFinished, SiteReplied
from simulations.population import build_population
from simulations.simulate import Simulated, simulate
from simulations.studies import baseline_members

QUICK = (
    "experiment=smoke",
    "federation.rounds=3",
    "federation.local.steps=2",
    "federation.local.expected_batch_size=24",
    "federation.local.optimizer.learning_rate=4.0",
    "privacy.insecure_seed=11",
)


def quick(*overrides: str) -> Experiment:
    return compose_experiment([*QUICK, *overrides])


@pytest.fixture(scope="module")
def private_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Simulated, list[Event]]:
    events: list[Event] = []
    return simulate(quick(), tmp_path_factory.mktemp("runs") / "private", (events.append,)), events


def test_private_training_beats_the_base(private_run: tuple[Simulated, list[Event]]) -> None:
    final = private_run[0].summary["final"]
    assert final["value"] < 0.75 * final["base"]


def test_every_site_stays_within_its_budget_and_uses_it(private_run: tuple[Simulated, list[Event]]) -> None:
    for site in private_run[0].summary["sites"].values():
        privacy = site["privacy"]
        assert 7.9 < privacy["epsilon_run"] <= 8 == privacy["epsilon_budget"]
        assert privacy["steps_executed"] == 6
        assert 0 < privacy["delta"] < 1e-3
        assert privacy["relation"] == "add or remove one record of a site, in one of its published slots"


def test_epsilon_grows_from_round_to_round(private_run: tuple[Simulated, list[Event]]) -> None:
    spent = [item["epsilon"]["harbor"] for item in private_run[0].summary["rounds"]]
    assert spent == sorted(spent)
    assert spent[0] > 0


def test_the_run_directory_is_complete(private_run: tuple[Simulated, list[Event]]) -> None:
    path = private_run[0].path
    names = {item.name for item in path.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "adapter",
        "checkpoints",
        "sites",
    }
    kinds = [json.loads(line)["kind"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    assert kinds.count("round_finished") == 3
    assert sorted(item.name for item in (path / "checkpoints").iterdir()) == [
        f"round-{number:05d}.safetensors" for number in (1, 2, 3)
    ]
    assert {item.name for item in (path / "sites").iterdir()} == set(private_run[0].summary["sites"])


def test_summary_adds_up(private_run: tuple[Simulated, list[Event]]) -> None:
    summary = private_run[0].summary
    assert summary["status"] == "finished"
    assert summary["bytes"]["up"] == sum(item["bytes"]["up"] for item in summary["rounds"])
    assert summary["bytes"]["up"] == sum(site["bytes"]["up"] for site in summary["sites"].values())
    seconds = summary["seconds"]
    phases = sum(seconds[phase] for phase in ("train", "aggregate", "evaluate", "other"))
    assert 0 < phases <= seconds["total"]
    assert set(summary["versions"]) >= {"cloister", "flwr", "opacus", "torch", "transformers", "peft", "python"}
    assert summary["privacy"]["epsilon"] == max(s["privacy"]["epsilon_run"] for s in summary["sites"].values())
    # B of every adapted matrix in float32, and a header: nothing else travels.
    values = summary["adapter"]["trained_values"]
    per_reply = summary["sites"]["harbor"]["bytes"]["up"] / 3
    assert values * 4 < per_reply < values * 4 + 12_000


def test_peft_loads_the_adapter_and_it_is_the_one_that_was_evaluated(
    private_run: tuple[Simulated, list[Event]],
) -> None:
    run = private_run[0]
    base = AutoModelForCausalLM.from_pretrained(resolve("embedded:clinic-base"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:clinic-base"))
    ids = tokenizer("Visit 12.", return_tensors="pt")["input_ids"]
    before = base(ids).logits.detach().clone()
    adapted = PeftModel.from_pretrained(base, run.path / "adapter")
    assert not torch.allclose(adapted(ids).logits, before)
    stored = load_file(run.path / "adapter" / "adapter_model.safetensors")
    last = _adapter_after(run, 3)
    assert stored.keys() == last.keys()
    assert all(torch.equal(stored[name], last[name]) for name in stored)
    card = (run.path / "adapter" / "README.md").read_text()
    assert "add or remove one record of a site" in card
    assert "δ = 8.3e-05" in card


def _adapter_after(run: Simulated, round_number: int) -> dict[str, torch.Tensor]:
    stored = load_file(run.path / "checkpoints" / f"round-{round_number:05d}.safetensors")
    return {name.removeprefix("adapter/"): tensor for name, tensor in stored.items()}


def test_no_private_fact_is_in_what_the_server_keeps(private_run: tuple[Simulated, list[Event]]) -> None:
    """Training loss, example counts and clip counts exist at the sites alone."""
    path = private_run[0].path
    kept = "".join((path / name).read_text() for name in ("metrics.jsonl", "summary.json", "report.html"))
    for site in (path / "sites").iterdir():
        for line in (site / "diagnostics.jsonl").read_text().splitlines():
            facts = json.loads(line)
            assert repr(facts["mean_loss"])[:7] not in kept
    for word in ("mean_loss", "clipped", "non_finite", '"examples"'):
        assert word not in kept


def test_gradients_that_are_not_finite_are_told_to_the_sites_own_log_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In 16 bit a network overflows after a step at 1e4, and a site whose draws add nothing learns nothing."""
    far = ("model.dtype=fp16", "federation.rounds=1", "federation.local.optimizer.learning_rate=1e4")
    with caplog.at_level(logging.WARNING, logger="client.rounds"):
        ran = simulate(quick(*far), tmp_path / "run")
    told = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert told
    assert all("round 1: the gradients of " in each and "learning rate" in each for each in told)
    assert "not finite" not in (ran.path / "metrics.jsonl").read_text()


def test_a_stored_config_repeats_the_run(private_run: tuple[Simulated, list[Event]], tmp_path: Path) -> None:
    stored = parse_experiment((private_run[0].path / "config.json").read_bytes())
    assert stored == quick()
    again = simulate(stored, tmp_path / "again")
    assert again.summary["adapter"]["digest"] == private_run[0].summary["adapter"]["digest"]


def test_events_arrive_while_the_run_goes_on(private_run: tuple[Simulated, list[Event]]) -> None:
    events = private_run[1]
    first_reply = next(i for i, event in enumerate(events) if isinstance(event, SiteReplied))
    first_round = next(i for i, event in enumerate(events) if isinstance(event, RoundFinished))
    assert first_reply < first_round < len(events) - 1


def test_without_privacy_it_learns_more_and_promises_nothing(
    private_run: tuple[Simulated, list[Event]], tmp_path: Path
) -> None:
    unclipped = (
        "federation.local.optimizer={kind: adamw, learning_rate: 0.01}"  # the private rate is for clipped gradients
    )
    run = simulate(compose_experiment([*QUICK[:-2], "privacy=none", unclipped]), tmp_path / "open")
    assert run.summary["privacy"]["epsilon"] is None
    assert run.summary["final"]["value"] < private_run[0].summary["final"]["value"]
    assert "Not private" in (run.path / "adapter" / "README.md").read_text()


def test_a_cohort_costs_only_those_who_took_part(tmp_path: Path) -> None:
    run = simulate(quick("federation.cohort_size=2", "evaluation.every=0"), tmp_path / "cohort")
    steps = [site["privacy"]["steps_executed"] if site["privacy"] else 0 for site in run.summary["sites"].values()]
    assert sum(steps) == 3 * 2 * 2
    assert len(set(steps)) > 1, "with this seed the sites take part unequally often"
    assert run.summary["final"] is None


def test_a_budget_ends_a_site_not_the_run(tmp_path: Path) -> None:
    """The site stops at its budget whatever the server asks; the refusal is named in the summary."""
    run = simulate(
        quick(
            "privacy.target_epsilon=null",
            "privacy.noise_multiplier=0.6",
            "federation.site_epsilon=2.0",
            "federation.min_replies=1",
            "evaluation.every=0",
        ),
        tmp_path / "budget",
    )
    refused = [(item["round"], reject["site"]) for item in run.summary["rounds"] for reject in item["rejected"]]
    # The smaller a site, the higher its sampling rate: ε after 2, 4 and 6 steps is 1.86, 2.19, 2.40 at the smallest.
    assert refused == [(2, "eastfield"), (3, "eastfield"), (3, "millbrook")]
    assert {reject["code"] for item in run.summary["rounds"] for reject in item["rejected"]} == {"budget_exceeded"}
    for site in run.summary["sites"].values():
        assert site["privacy"] is None or site["privacy"]["epsilon_total"] <= 2.0


def test_published_weights_change_the_mean(private_run: tuple[Simulated, list[Event]], tmp_path: Path) -> None:
    run = simulate(quick("strategy.weights=published_records", "evaluation.every=0"), tmp_path / "weights")
    assert run.summary["adapter"]["digest"] != private_run[0].summary["adapter"]["digest"]


@pytest.mark.slow
def test_the_private_federation_beats_every_site_alone(
    private_run: tuple[Simulated, list[Event]], tmp_path: Path
) -> None:
    """Same ε, same rounds, same pooled held-out records: what a site gains by taking part."""
    population = build_population(quick())
    alone = [
        simulate(member.experiment, tmp_path / member.name, (), member.population).summary["final"]["value"]
        for member in baseline_members(quick(), population)
        if member.name.startswith("alone-")
    ]
    assert len(alone) == 4
    federated = private_run[0].summary["final"]["value"]
    assert federated < sum(alone) / len(alone), (federated, alone)
