"""A checkpoint goes into its network completely, or the error names what does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from conf.schema.model import Model
from conf.schema.task import CausalLM, Classification
from finetuning import models
from finetuning.models import load_base
from protocol.errors import ModelError

TinyModel = Callable[..., Path]
LABELS = Classification(labels=("no", "yes"))
NEW = Classification(labels=("no", "yes"), head="new")


@pytest.fixture(autouse=True)
def _nothing_loaded() -> None:
    models._load.cache_clear()  # type: ignore[attr-defined]


@pytest.fixture
def changed(tiny_model: TinyModel, tmp_path: Path) -> Callable[..., str]:
    """Return `make(family, weights=None, config=None)`: a copy whose tensors or configuration a function changed."""

    def make(family: str, weights: Any = None, config: dict[str, Any] | None = None) -> str:
        copy = shutil.copytree(tiny_model(family), tmp_path / "copy", dirs_exist_ok=True)
        if weights is not None:
            tensors = weights(load_file(copy / "model.safetensors"))
            save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        stored = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(stored | (config or {})))
        return str(copy)

    return make


@pytest.mark.parametrize("task", [LABELS, CausalLM()])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_a_wrappers_prefix_is_taken_off(prefix: str, task: Any, changed: Any, tiny_model: TinyModel) -> None:
    family = "bert" if task is LABELS else "llama"
    path = changed(family, lambda tensors: {prefix + name: each for name, each in tensors.items()})
    plain = load_base(Model(path=str(tiny_model(family))), task, "cpu")
    loaded = load_base(Model(path=path), task, "cpu")
    assert loaded.fresh == plain.fresh
    state = plain.network.state_dict()
    assert all(torch.equal(each, state[name]) for name, each in loaded.network.state_dict().items())


def test_a_wrapper_within_is_taken_off(changed: Any, tiny_model: TinyModel) -> None:
    """As FSDP and activation checkpointing of single blocks store it."""

    def wrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."): each for name, each in tensors.items()}

    state = load_base(Model(path=str(tiny_model("llama"))), CausalLM(), "cpu").network.state_dict()
    loaded = load_base(Model(path=changed("llama", wrapped)), CausalLM(), "cpu").network.state_dict()
    assert all(torch.equal(each, state[name]) for name, each in loaded.items())


@pytest.mark.parametrize(
    ("family", "weights", "config", "message"),
    [
        ("bert", None, {"num_hidden_layers": 4}, r"lacks 32 of the network's \d+ tensors, such as bert\S+layer\.2"),
        ("llama", None, {"num_hidden_layers": 3}, r"lacks 9 of the network's \d+ tensors, such as model\.layers\.2"),
        (
            "bert",
            lambda tensors: {name: each for name, each in tensors.items() if "layer.1.output.dense.bias" not in name},
            {},
            r"lacks 1 of .* such as bert\.encoder\.layer\.1\.output\.dense\.bias",
        ),
        (
            "llama",
            lambda tensors: {name.replace("q_proj", "query_proj"): each for name, each in tensors.items()},
            {},
            r"lacks 2 of .* such as model\.layers\.0\.self_attn\.q_proj\.weight; it has 2 .* such as \S+query_proj",
        ),
        ("bert", None, {"num_hidden_layers": 1}, r"holds 16 tensor\(s\) .* no place for, such as bert\.\S+layer\.1"),
        ("llama", None, {"num_hidden_layers": 1}, r"holds 9 tensor\(s\) .* no place for, such as model\.layers\.1"),
        ("qwen2", None, {"model_type": "llama"}, r"holds 6 tensor\(s\) .* such as \S+self_attn\.k_proj\.bias"),
        ("qwen3", None, {"model_type": "llama"}, r"holds 4 tensor\(s\) .* such as model\.layers\.0\.self_attn\.k_norm"),
        (
            "llama",
            lambda tensors: tensors | {"lm_head.bias": torch.zeros(320)},
            {},
            r"holds 1 tensor\(s\) .* such as lm_head\.bias",
        ),
        ("llama", None, {"intermediate_size": 40}, r"\S+down_proj\.weight of shape \(32, 48\), .* needs \(32, 40\)"),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_networks(
    family: str, weights: Any, config: dict[str, Any], message: str, changed: Any
) -> None:
    task = LABELS if family == "bert" else CausalLM()
    with pytest.raises(ModelError, match=message):
        load_base(Model(path=changed(family, weights, config)), task, "cpu")


def test_what_older_releases_stored_besides_is_no_loss(changed: Any) -> None:
    old = {
        "bert.embeddings.position_ids": torch.arange(64)[None],
        "bert.encoder.layer.0.attention.self.rotary_emb.inv_freq": torch.ones(4),
    }
    base = load_base(Model(path=changed("bert", lambda tensors: tensors | old)), LABELS, "cpu")
    assert base.fresh == ("bert.pooler.dense", "classifier")


def test_tied_weights_are_stored_once(tiny_model: TinyModel) -> None:
    stored = load_file(tiny_model("qwen3") / "model.safetensors")
    assert "lm_head.weight" not in stored
    base = load_base(Model(path=str(tiny_model("qwen3"))), CausalLM(), "cpu")
    assert torch.equal(base.network.get_output_embeddings().weight, stored["model.embed_tokens.weight"])


def classifier(folder: Path, source: Path, names: tuple[str, ...]) -> str:
    """Save a classifier for some classes, whose head is no fresh one."""
    known = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    network = AutoModelForSequenceClassification.from_pretrained(source, **known)
    with torch.no_grad():
        network.classifier.weight.fill_(0.5)
    network.save_pretrained(folder)
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)
    return str(folder)


def test_another_number_of_classes(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = classifier(tmp_path / "three", tiny_model("bert"), ("a", "b", "c"))
    with pytest.raises(
        ModelError, match=r"its head is for 3 classes, task.labels names 2 \(no, yes\); .* task.head=new"
    ):
        load_base(Model(path=path), LABELS, "cpu")
    base = load_base(Model(path=path), NEW, "cpu")
    assert base.network.classifier.weight.shape == (2, 32)
    assert base.fresh == ("classifier",)


def test_a_new_head_replaces_one_of_the_same_size(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = classifier(tmp_path / "two", tiny_model("bert"), ("a", "b"))
    kept = load_base(Model(path=path), LABELS, "cpu")
    assert (kept.network.classifier.weight == 0.5).all()
    assert kept.fresh == ()
    new = load_base(Model(path=path), NEW, "cpu")
    assert new.fresh == ("classifier",)
    assert new.network.classifier.weight.std() > 0
    again = models.read_base(Model(path=path), NEW, torch.device("cpu"))
    assert torch.equal(again.network.classifier.weight, new.network.classifier.weight)
    body = kept.network.bert.state_dict()
    assert all(torch.equal(each, body[name]) for name, each in new.network.bert.state_dict().items())


def test_a_head_that_knows_the_classes_in_another_order(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = classifier(tmp_path / "two", tiny_model("bert"), ("Yes", "No"))
    with pytest.raises(
        ModelError, match=r"knows the classes as Yes, No, in that order, task.labels names no, yes; use its"
    ):
        load_base(Model(path=path), LABELS, "cpu")
    assert load_base(Model(path=path), Classification(labels=("yes", "no")), "cpu").fresh == ()
    assert load_base(Model(path=path), NEW, "cpu").fresh == ("classifier",)
