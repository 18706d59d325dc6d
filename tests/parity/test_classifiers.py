"""Classifiers of every make train under privacy: special tokens that they count, heads of several modules, poolers."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from client.dry_run import way_of_gradients
from conf.schema.data import LabelledColumns
from conf.schema.federation import LocalTraining
from conf.schema.model import LoRA, Model
from conf.schema.privacy import ExampleLevel
from conf.schema.site import SiteRuntime
from conf.schema.task import Classification
from finetuning.adapters import attach
from finetuning.batches import collate, tokenize_rows
from finetuning.models import load_base, load_tokenizer
from finetuning.tasks.build import build_objective
from privacy.plan import build_plan
from protocol.errors import ModelError

_path = Path(__file__).parents[1] / "unit" / "finetuning" / "architectures.py"
_spec = importlib.util.spec_from_file_location("architectures", _path)
assert _spec is not None
assert _spec.loader is not None
architectures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architectures)

LABELS = Classification(labels=("calm", "ill"))
ROWS = [
    {"text": "the patient reports a sore throat and fever for three days", "label": "ill"},
    {"text": "great value", "label": "calm"},
    {"text": "mild chest pain on stairs, no known allergies", "label": "ill"},
    {"text": "the battery lasts a week", "label": "calm"},
]
FAMILIES = (
    *("bart", "t5", "mpt", "gpt2", "mistral", "bert", "distilbert"),
    *("roberta", "electra", "deberta-v2", "albert", "modernbert"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_trains(family: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = tiny_tokenizer
    if family == "t5":  # which has an end, and nothing else
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
    model = Model(path=str(architectures.save(family, tmp_path / "model", tokenizer)))
    base = load_base(model, LABELS, "cpu")
    adapted = attach(base, LoRA(rank=4), LABELS)
    adapted.load(adapted.initial(0))
    trained, objective = adapted.train_only(adapted.names), build_objective(LABELS)
    asked = ExampleLevel(noise_multiplier=1.0, delta=1e-3)
    plan = build_plan(asked, LocalTraining(expected_batch_size=4), rounds=1, published_units=100, num_units=60)
    try:
        way = way_of_gradients(plan, asked, adapted, trained, objective, SiteRuntime(), classes=2)
    except ModelError as error:
        pytest.fail(f"{family}: {error}")
    assert way in ("native", "one_by_one")

    # The framing of a preview, which loads no network, is that of a run.
    examples = [
        tokenize_rows(ROWS, LabelledColumns(), each, max_length=12, labels=LABELS.labels).examples
        for each in (base.tokenizer, load_tokenizer(model))
    ]
    assert [each.input_ids.tolist() for each in examples[0]] == [each.input_ids.tolist() for each in examples[1]]
    if family in ("bart", "t5"):
        assert all(each.input_ids[-1] == base.tokenizer.eos_token_id for each in examples[0])
    adapted.network.eval()
    batch = collate(examples[0], base.pad_token_id)
    before = objective.losses(adapted.network, batch)
    assert before.shape == (4,)
    for _ in range(12):
        gradients = torch.autograd.grad(objective.losses(adapted.network, batch).mean(), list(trained.values()))
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter -= 0.02 * gradient
    assert objective.losses(adapted.network, batch).mean() < before.mean()
