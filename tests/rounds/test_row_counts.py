"""How many rows were cut or left out: the preview and the run agree, the site's log says it, and no reply does."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.data import app
from cli.tables import record_lines
from client.site import Site
from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from finetuning.adapters import attach
from finetuning.models import load_base
from protocol.instructions import Instruction, InstructionHeader, client_plan
from protocol.tensors import digest
from simulations.population import build_population, site_file
from simulations.simulate import simulate
from strategies.build import build_strategy

CONTEXT = 64
SHORT, CUT, LOST = 20, 7, 11


@pytest.fixture
def overrides(tmp_path: Path, tiny_model: Callable[..., Path]) -> list[str]:
    """A model of 64 positions whose tokenizer states no length, and rows that are short, cut, and cut before the
    completion."""
    model = tmp_path / "gpt2"
    shutil.copytree(tiny_model("gpt2"), model)
    stated = json.loads((model / "tokenizer_config.json").read_text())
    del stated["model_max_length"]
    (model / "tokenizer_config.json").write_text(json.dumps(stated))
    rows = [{"prompt": f"question {number} ", "completion": "good night </s>"} for number in range(SHORT)]
    rows += [{"prompt": f"question {number} ", "completion": "xyz" * 40} for number in range(CUT)]
    rows += [{"prompt": "xyz" * 40 + str(number), "completion": "good"} for number in range(LOST)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"part": "train"}) + "\n" for row in rows))
    return [
        "model=causal_lm",
        f"model.path={model}",
        "data=jsonl_prompt_completion",
        f"data.source.path={data}",
        "data.split_column=part",
        "data.partition={kind:iid,sites:1}",
        "federation.rounds=1",
        "federation.min_replies=1",
        "federation.local.steps=1",
        "federation.local.expected_batch_size=2",
        "evaluation.every=0",
        "privacy=none",
        "runtime.threads=1",
    ]


def test_preview_and_run_take_the_same_rows(overrides: list[str], tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["preview", *overrides, "--examples", "0"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert f"{SHORT + CUT} of {SHORT + CUT + LOST} rows kept" in shown.output
    assert f"{CUT + LOST} rows cut to data.max_length={CONTEXT} tokens" in shown.output

    run = simulate(compose_experiment(overrides), tmp_path / "run")
    assert run.summary["records"] == {
        "site-1": {
            "rows": SHORT + CUT + LOST,
            "kept": SHORT + CUT,
            "truncated": CUT + LOST,
            "left_out": LOST,
            "special_tokens": SHORT,
            "merged": run.summary["records"]["site-1"]["merged"],
            "max_length": CONTEXT,
        }
    }
    lines = record_lines(run.summary)
    assert lines[:2] == [
        f"records  {CUT + LOST} rows cut to the longest sequence: site-1 {CUT + LOST}",
        f"records  {LOST} rows left out, with nothing to learn (empty, or cut before the completion): site-1 {LOST}",
    ]


def test_a_wish_above_the_context_is_refused_by_the_preview_too(overrides: list[str]) -> None:
    shown = CliRunner().invoke(app, ["preview", *overrides, "data.max_length=65"])
    assert "data.max_length=65 is above the model's context of 64 tokens" in str(shown.exception)


@pytest.mark.parametrize(("simulated", "level"), [(False, logging.WARNING), (True, logging.INFO)])
def test_a_site_tells_its_own_log_and_nobody_else(
    simulated: bool, level: int, overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = compose_experiment(overrides)
    (own,) = build_population(experiment).parts.values()
    site = Site(site_file(experiment, "harbor", len(own), tmp_path / "state"), rows=lambda: own, simulated=simulated)
    assert site.tokenization is None
    with caplog.at_level(logging.INFO, logger="client.site"):
        reply = site.handle(instruction(experiment))
        site.handle(instruction(experiment))
    site.close()
    assert reply.header.status == "trained"
    told = [record for record in caplog.records if record.name == "client.site"]
    assert {record.levelno for record in told} == {level}
    sentences = [record.getMessage() for record in told]
    assert sentences[:2] == [
        f"site harbor: {sentence}"
        for sentence in site.tokenization.sentences()[:2]  # type: ignore[union-attr]
    ]
    assert f"site harbor: {CUT + LOST} rows cut to data.max_length={CONTEXT} tokens" in sentences
    assert len(sentences) == len(set(sentences)), "once, not in each round"
    sent = reply.header.model_dump_json()
    assert not any(word in sent for word in ("truncated", "left_out", "kept", "merged", "special_tokens"))


def instruction(experiment: Experiment) -> Instruction:
    adapted = attach(load_base(experiment.model, experiment.task, "cpu"), experiment.peft, experiment.task)
    start = adapted.initial(experiment.seed)
    plan = client_plan(experiment, "run")
    header = InstructionHeader(
        round=1,
        plan=plan,
        plan_digest=plan.digest,
        base_digest=adapted.base.digest,
        adapter_digest=digest(start),
        clip_norm=None,
        release=None,
    )
    trained = build_strategy(experiment.strategy).trained(frozenset(start), 1)
    return Instruction(header, {name: start[name] for name in trained})
