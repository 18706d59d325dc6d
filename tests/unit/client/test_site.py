"""One site behind its door: what leaves, what stays, what is spent, and that nothing leaks to the next site."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from client.site import Site
from conf.schema.privacy import NoPrivacy
from conf.schema.site import SiteFile
from privacy.accounting import epsilon_of
from privacy.mechanisms import SubsampledGaussian, Truncation
from protocol.errors import BudgetExceeded, DataError, PrivacyError
from protocol.instructions import Instruction, client_plan
from simulations.population import build_population, site_file

Make = Callable[..., Any]


def test_a_round_returns_an_update_of_what_the_strategy_trains(make_site: Make, small: Make, instruct: Make) -> None:
    experiment = small("strategy=ffa_lora")
    asked = instruct(experiment)
    reply = make_site(experiment).handle(asked)
    assert reply.header.status == "trained"
    assert reply.tensors.keys() == asked.tensors.keys()
    assert all("lora_A" not in name for name in reply.tensors)
    assert any(tensor.abs().max() > 0 for tensor in reply.tensors.values())


def test_metrics_stay_unless_the_policy_releases_them(
    make_site: Make, tmp_path: Path, small: Make, instruct: Make
) -> None:
    reply = make_site(small()).handle(instruct(small()))
    assert reply.header.metrics == {}
    line = json.loads((tmp_path / "state/harbor/diagnostics.jsonl").read_text())
    assert line["mean_loss"] > 0
    sent = reply.header.model_dump_json()
    assert f"{line['mean_loss']:.4f}"[:5] not in sent
    assert "examples" not in sent

    released = small("federation.release_training_loss=true", private=False)
    reply = make_site(released, state="other").handle(instruct(released))
    assert set(reply.header.metrics) == {"training_loss"}
    # The server's noise covers the update; a loss beside it would be covered by nothing.
    whole = small("privacy=client_level", private=False)
    site = make_site(released, state="whole").handle(instruct(whole))
    assert (site.header.status, site.header.metrics) == ("trained", {})
    noised = small("privacy.loss_noise_multiplier=50")
    reply = make_site(noised, state="noised").handle(instruct(noised))
    assert set(reply.header.metrics) == {"noisy_training_loss"}


def test_epsilon_is_that_of_the_executed_steps(make_site: Make, small: Make, instruct: Make) -> None:
    experiment = small()
    site = make_site(experiment)
    for round_number in (1, 2):
        privacy = site.handle(instruct(experiment, round_number)).header.privacy
        assert privacy is not None
        executed = SubsampledGaussian(6 / 60, privacy.noise_multiplier, 2 * round_number, Truncation(60, 18))
        assert privacy.steps_executed == executed.steps
        assert privacy.epsilon_run == pytest.approx(epsilon_of([executed], privacy.delta or 0))
    assert privacy.epsilon_run <= 8
    assert privacy.epsilon_run > 7.9, "the noise is calibrated for the whole run, not for each round"


def test_the_budget_is_a_hard_stop(
    make_site: Make, small: Make, instruct: Make, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = small()
    site = make_site(experiment)
    assert [site.handle(instruct(experiment, number)).header.status for number in (1, 2)] == ["trained", "trained"]
    # The server starts over under another name: the records are the same, so the budget is.
    reply = site.handle(instruct(experiment, 1, run="again"))
    assert (reply.header.status, reply.header.code) == ("refused", "budget_exceeded")
    assert reply.header.reason == "the round would exceed this site's budget"
    assert "above its budget of 8" in caplog.text, "the figures are the operator's"
    assert not reply.tensors


def test_runs_that_are_refused_leave_nothing_on_the_disk(
    make_site: Make, small: Make, instruct: Make, tmp_path: Path
) -> None:
    """A server may name any number of runs; what it sent is kept for those that were paid for."""
    experiment = small("quantization=eden", "quantization.downlink=same")
    site = make_site(experiment)
    replies = [site.handle(instruct(experiment, number, run=run)) for run in ("run", "again") for number in (1, 2)]
    assert [reply.header.code for reply in replies] == ["", "", "budget_exceeded", "budget_exceeded"]
    (kept,) = tmp_path.glob("**/references/*")
    assert sorted(path.name for path in kept.iterdir()) == ["000001.safetensors", "000002.safetensors"]


def test_the_budget_outlives_the_process(make_site: Make, small: Make, instruct: Make) -> None:
    experiment = small()
    first = make_site(experiment)
    first.handle(instruct(experiment, 1))
    first.handle(instruct(experiment, 2))
    first.close()
    assert make_site(experiment).handle(instruct(experiment, 2, run="again")).header.code == "budget_exceeded"


def test_the_same_seed_gives_the_same_update_and_sites_differ(make_site: Make, small: Make, instruct: Make) -> None:
    experiment = small()
    once = make_site(experiment).handle(instruct(experiment)).tensors
    other = make_site(experiment, name="northgate", state="b").handle(instruct(experiment)).tensors
    again = make_site(experiment, state="c").handle(instruct(experiment)).tensors
    name = next(iter(once))
    assert not torch.equal(once[name], other[name])
    # `northgate` trained in between on the shared network: nothing of it is left.
    assert all(torch.equal(once[key], again[key]) for key in once)


def test_without_an_insecure_seed_no_two_updates_agree(make_site: Make, small: Make, instruct: Make) -> None:
    experiment = small("privacy.insecure_seed=null")
    torch.manual_seed(0)
    once = make_site(experiment).handle(instruct(experiment)).tensors
    torch.manual_seed(0)
    again = make_site(experiment, state="b").handle(instruct(experiment)).tensors
    assert all(not torch.equal(once[key], again[key]) for key in once)


@pytest.mark.parametrize("optimizer", ["sgd", "{kind:adamw,learning_rate:0.01}"])
def test_optimizer_state_does_not_survive_a_round(make_site: Make, optimizer: str, small: Make, instruct: Make) -> None:
    key = "federation.local.optimizer.kind" if optimizer == "sgd" else "federation.local.optimizer"
    experiment = small(f"{key}={optimizer}")
    once = make_site(experiment).handle(instruct(experiment)).tensors
    again = make_site(experiment, state="b").handle(instruct(experiment)).tensors
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_wrong_base_is_refused(make_site: Make, small: Make, instruct: Make) -> None:
    asked = instruct(small())
    header = asked.header.model_copy(update={"base_digest": "0" * 64})
    assert make_site(small()).handle(Instruction(header, asked.tensors)).header.code == "wrong_base"


@pytest.mark.parametrize("damage", ["missing", "nan", "value"])
def test_a_damaged_adapter_is_refused_before_anything_is_spent(
    make_site: Make, damage: str, small: Make, instruct: Make
) -> None:
    asked = instruct(small())
    tensors = {name: tensor.clone() for name, tensor in asked.tensors.items()}
    name = next(iter(tensors))
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name].view(-1)[0] = float("nan") if damage == "nan" else 1.0
    site = make_site(small())
    reply = site.handle(Instruction(asked.header, tensors))
    expected = {"missing": "missing_tensor", "nan": "not_finite", "value": "adapter_digest"}
    assert reply.header.code == expected[damage]
    assert site.state.spent() == 0


def test_rehearsal_names_an_empty_site(make_site: Make, small: Make) -> None:
    with pytest.raises(DataError, match="site harbor has no training record"):
        make_site(small(), rows=0).rehearse(client_plan(small(), "run"))


def test_a_site_smaller_than_the_batch_takes_part_with_a_batch_of_its_own(make_site: Make, small: Make) -> None:
    plan = make_site(small(), rows=1).rehearse(client_plan(small(), "run"))
    assert (plan.sampling.rate, plan.normalizer) == (1, 1)


def test_rehearsal_names_a_delta_that_is_too_large(make_site: Make, small: Make) -> None:
    experiment = small("privacy.delta=0.02")
    with pytest.raises(PrivacyError, match=r"δ=0.02 .* is not below 1/n=0.0167 of this site's 60 records"):
        make_site(experiment).rehearse(client_plan(experiment, "run"))


def test_rehearsal_names_a_budget_too_small_for_any_step(make_site: Make, small: Make) -> None:
    experiment = small("federation.site_epsilon=0.01", "privacy.target_epsilon=null", "privacy.noise_multiplier=1")
    with pytest.raises(BudgetExceeded, match=r"a single step costs ε=\d.*above the site's whole budget of 0.01"):
        make_site(experiment).rehearse(client_plan(experiment, "run"))


def test_rehearsal_names_a_sequence_bound_above_the_context(make_site: Make, small: Make) -> None:
    experiment = small("data.max_length=999")
    with pytest.raises(DataError, match=r"data.max_length=999 is above the model's context of 256 tokens"):
        make_site(experiment).rehearse(client_plan(experiment, "run"))


def test_rehearsal_spends_nothing(make_site: Make, tmp_path: Path, small: Make) -> None:
    make_site(small()).rehearse(client_plan(small(), "run"))
    assert not (tmp_path / "state").exists()


def test_a_real_site_trains_on_all_its_records_unless_a_column_says_otherwise(tmp_path: Path, small: Make) -> None:
    path = tmp_path / "notes.jsonl"
    rows = [{"prompt": "a", "completion": f" {n}", "split": "train" if n % 2 else "heldout"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def records(**data: object) -> int:
        columns = {"kind": "prompt_completion"}
        file = SiteFile.model_validate(
            {
                "name": "s",
                "published_records": 40,
                "model_path": "embedded:clinic-base",
                "data": {"source": {"path": str(path)}, "columns": columns, **data},
                "state_directory": str(tmp_path / "state"),
            }
        )
        site = Site(file)
        return len(site._records(site._adapted(client_plan(small(), "run")), NoPrivacy(), b"").examples)

    assert records() == 40
    assert records(split_column="split") == 20
    with pytest.raises(ValidationError, match=r"data.max_records=7 must be null at a site: .* the ε would not hold"):
        records(max_records=7)


@pytest.mark.parametrize("data", [{}, {"split_column": "split"}])
def test_one_record_less_changes_nothing_of_the_others_that_a_site_reads(tmp_path: Path, data: dict[str, str]) -> None:
    """The guarantee is about adding or removing one record: what is read of the others must not depend on it."""
    path = tmp_path / "notes.jsonl"
    rows = [{"prompt": "a", "completion": f" {n}", "split": "train" if n % 2 else "heldout"} for n in range(40)]

    def read(written: list[dict[str, str]]) -> list[str]:
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
        file = SiteFile.model_validate(
            {
                "name": "s",
                "published_records": 40,
                "model_path": "embedded:clinic-base",
                "data": {"source": {"path": str(path)}, "columns": {"kind": "prompt_completion"}, **data},
                "state_directory": str(tmp_path / "state"),
            }
        )
        return [row["completion"] for row in Site(file).read_records()]

    everything = read(rows)
    for position in (0, 1, 17, 39):
        gone = rows[position]["completion"]
        assert read(rows[:position] + rows[position + 1 :]) == [each for each in everything if each != gone]


def test_a_server_cannot_test_for_labels(tmp_path: Path, small: Make, instruct: Make) -> None:
    """Whether a label set fits the records would be an exact answer about them, for free."""
    path = tmp_path / "notes.csv"
    path.write_text("text,label\n" + "cough,flu\nrash,measles\n" * 20)
    data = {"source": {"path": str(path)}, "columns": {"kind": "labelled"}}
    file = SiteFile.model_validate(
        {
            "name": "s",
            "published_records": 40,
            "model_path": "embedded:clinic-base",
            "task": {"kind": "classification", "labels": ["flu", "measles", "hiv"]},
            "budget": {"epsilon": 8, "delta": 1e-3},
            "policy": {},
            "data": data,
            "state_directory": str(tmp_path / "state"),
        }
    )
    for labels in ("[flu,measles]", "[flu,cold]", "[flu,measles,hiv,cold]"):
        overrides = ["data=csv_labelled", f"data.source.path={path}", "task=classification", f"task.labels={labels}"]
        assert Site(file, simulated=True).handle(instruct(small(*overrides))).header.code == "wrong_task"


def test_a_server_cannot_make_a_site_open_another_model(tmp_path: Path, small: Make, instruct: Make) -> None:
    """The plan's name of the base is never followed: not to a folder, not to a hub."""
    experiment = small()
    asked = instruct(experiment)
    model = asked.header.plan.model.model_copy(update={"path": "somebody/else"})
    plan = asked.header.plan.model_copy(update={"model": model})
    header = asked.header.model_copy(update={"plan": plan, "plan_digest": plan.digest})
    rows = build_population(experiment).parts["harbor"][:60]
    site = Site(site_file(experiment, "harbor", 60, tmp_path), rows=lambda: rows, simulated=True)
    assert site.handle(Instruction(header, asked.tensors)).header.status == "trained"


def test_a_layer_without_a_rule_is_refused_before_anything_is_spent(
    tmp_path: Path, small: Make, instruct: Make
) -> None:
    gradients = ("privacy.per_example_gradients=opacus", "privacy.without_rule=refuse")
    experiment = small("peft.targets=[embed_tokens]", "strategy=fedit", *gradients)
    rows = build_population(experiment).parts["harbor"][:60]
    site = Site(site_file(experiment, "harbor", 60, tmp_path), rows=lambda: rows, simulated=True)
    with pytest.raises(PrivacyError, match=r"no per-example gradient rule in opacus: .*embed_tokens"):
        site.handle(instruct(experiment))
    assert site.state.spent() == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": 5}\n', r"^site north: .*a\.jsonl, line 3: column 'text' holds a int"),
        ('{"text": "a"}\n{"text": "\\ud83d"}\n', r"^site north: .*a\.jsonl, line 2: column 'text' holds half"),
        ('{"text": ""}\n\n{"text": ""}\n', r"^site north: none of 2 rows .* \(lines 1, 3 of .*a\.jsonl\)"),
        ('{"text": "a", "who": "x"}\n\n{"text": "b"}\n', r"^site north: .*a\.jsonl, line 3: no column 'who'"),
        (
            '{"text": "a", "who": "x"}\n\n{"text": "b", "who": null}\n',
            r"^site north: .*a\.jsonl, line 3 has no value in",
        ),
    ],
)
def test_a_faulty_record_is_named_with_its_line_and_the_site(
    content: str, message: str, tmp_path: Path, small: Make, instruct: Make
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    level = "user_level" if "who" in content else "example_level"
    file = SiteFile.model_validate(
        {
            "name": "north",
            "published_records": 40,
            "published_users": 40,
            "data": {
                "source": {"path": str(tmp_path / "a.jsonl")},
                "columns": {"kind": "text"},
                "user_column": "who",
            },
            "budget": {"unit": "user" if level == "user_level" else "record", "epsilon": 8, "delta": 1e-3},
            "policy": {"require_approval": False},
            "model_path": "embedded:clinic-base",
            "state_directory": str(tmp_path / "state"),
        }
    )
    overrides = ("privacy=user_level", "data.user_column=who") if level == "user_level" else ()
    site = Site(file, simulated=True)
    with pytest.raises(DataError, match=message):
        site.handle(instruct(small(*overrides)))
    assert not (tmp_path / "state" / "ledger.db").exists() or site.state.spent() == 0
