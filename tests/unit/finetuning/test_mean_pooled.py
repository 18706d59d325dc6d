"""A head on the mean of an encoder's last layer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from conf.pooling import states_mean
from conf.schema.model import LoRA, Model
from conf.schema.strategy import FFALoRA
from conf.schema.task import Classification
from finetuning.adapters import attach
from finetuning.export import export_adapter
from finetuning.mean_pooled import MeanPooledClassifier
from finetuning.models import base_digest, load_base
from finetuning.shapes import trained_values

LABELS = Classification(labels=("left", "middle", "right"))
IDS = torch.tensor([[9, 31, 77, 102, 0, 0], [250, 6, 18, 44, 12, 7]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
Make = Callable[..., Path]


@pytest.fixture
def sentence_encoder(tiny_model: Make, tmp_path: Path) -> Path:
    """A tiny BERT that says that it was trained for the mean, as sentence encoders do."""
    folder = tiny_model("bert", tmp_path / "encoder")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    )
    return folder


def test_the_mean_is_over_a_texts_own_tokens(sentence_encoder: Path) -> None:
    body = AutoModel.from_pretrained(sentence_encoder).eval()
    network = MeanPooledClassifier(body, 3).eval()
    torch.nn.init.normal_(network.classifier.weight)
    with torch.inference_mode():
        states = body(input_ids=IDS, attention_mask=MASK).last_hidden_state
        expected = network.classifier(torch.stack([states[0, :4].mean(0), states[1].mean(0)]))
        torch.testing.assert_close(network(input_ids=IDS, attention_mask=MASK).logits, expected)
        whole = network(input_ids=IDS[1:]).logits
    torch.testing.assert_close(whole, expected[1:])


def test_a_new_head_starts_at_zero_and_lora_still_reaches_every_layer(sentence_encoder: Path) -> None:
    base = load_base(Model(path=str(sentence_encoder)), LABELS, "cpu")
    assert isinstance(base.network, MeanPooledClassifier)
    assert base.fresh == ("classifier",)
    assert not base.network(input_ids=IDS, attention_mask=MASK).logits.any()
    adapted = attach(base, LoRA(rank=2), LABELS)
    layers = {name.partition(".lora_")[0] for name in adapted.names if ".lora_" in name}
    assert len(layers) == 6 * base.network.config.num_hidden_layers
    assert not any("pooler" in name for name in adapted.names)


@pytest.mark.parametrize("targets", ["auto", "none"])
def test_the_count_is_that_of_the_attached_adapter(targets: str, sentence_encoder: Path) -> None:
    model, peft = Model(path=str(sentence_encoder)), LoRA.model_validate({"rank": 2, "targets": targets})
    adapted = attach(load_base(model, LABELS, "cpu"), peft, LABELS)
    trained = [each for name, each in adapted.parameters.items() if ".lora_A" not in name]
    assert trained_values(model, peft, FFALoRA(), LABELS) == sum(each.numel() for each in trained)
    if targets == "none":
        assert sorted(adapted.names) == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]


@pytest.mark.parametrize("targets", ["auto", "none"])
def test_peft_reads_what_is_exported(targets: str, sentence_encoder: Path, tmp_path: Path) -> None:
    base = load_base(Model(path=str(sentence_encoder)), LABELS, "cpu")
    adapted = attach(base, LoRA.model_validate({"rank": 2, "targets": targets}), LABELS)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(each.shape, generator=generator) for name, each in adapted.initial(0).items()}
    adapted.load(tensors)
    export_adapter(tmp_path / "adapter", adapted, tensors, base=str(sentence_encoder), card="# a card\n")
    plain = MeanPooledClassifier(AutoModel.from_pretrained(sentence_encoder), 3)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.inference_mode():
        ours = adapted.network.eval()(input_ids=IDS, attention_mask=MASK).logits
        torch.testing.assert_close(theirs(input_ids=IDS, attention_mask=MASK).logits, ours, rtol=1e-5, atol=1e-5)


def test_what_a_checkpoint_states_is_part_of_its_digest(sentence_encoder: Path, tiny_model: Make) -> None:
    """Two sites whose copies differ in it would train different networks."""
    assert states_mean(sentence_encoder)
    assert not states_mean(tiny_model("bert"))
    assert base_digest(Model(path=str(sentence_encoder))) != base_digest(Model(path=str(tiny_model("bert"))))


@pytest.mark.parametrize("text", ["", "[]", '{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}'])
def test_anything_else_is_no_mean(text: str, tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(text)
    assert not states_mean(tmp_path)


def test_the_choice_can_be_made_by_hand(sentence_encoder: Path, tiny_model: Make) -> None:
    stock, mean = (LABELS.model_copy(update={"pooling": choice}) for choice in ("model", "mean"))
    assert not isinstance(load_base(Model(path=str(sentence_encoder)), stock, "cpu").network, MeanPooledClassifier)
    assert isinstance(load_base(Model(path=str(tiny_model("bert"))), mean, "cpu").network, MeanPooledClassifier)
