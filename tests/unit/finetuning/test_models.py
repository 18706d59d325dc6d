"""Finding, loading, freezing and identifying a base model."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from conf.schema.model import Model
from conf.schema.task import CausalLM, Classification
from finetuning import models
from finetuning.models import base_digest, load_base, load_tokenizer, pick_device, stated_context
from protocol.errors import ModelError

CAUSAL = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt2")
ENCODERS = ("bert", "roberta")
LABELS = Classification(labels=("left", "middle", "right"))
IDS = torch.tensor([[9, 31, 77, 102, 250, 6]])
TinyModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _nothing_loaded() -> None:
    """A base that another test attached an adapter to is no fresh base."""
    models._load.cache_clear()  # type: ignore[attr-defined]


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def put_in_cache(cache: Path, hub_id: str, source: Path, revision: str = "main") -> Path:
    """Store a folder as the hub's client would: content-addressed blobs, a snapshot of links, and a ref."""
    commit = hashlib.sha1(revision.encode()).hexdigest()
    root = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for number, path in enumerate(sorted(source.iterdir())):
        blob = root / "blobs" / f"{commit[-8:]}{number}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    return snapshot


@pytest.mark.parametrize("family", CAUSAL)
def test_a_language_model_of_every_family(family: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(family)
    base = load_base(Model(path=str(folder)), CausalLM(), "cpu")
    assert (base.device.type, base.pad_token_id, base.context, base.fresh) == ("cpu", 0, 64, ())
    assert base.network.config.pad_token_id == 0
    assert base.network.config.use_cache is False
    assert not any(parameter.requires_grad for parameter in base.network.parameters())
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        ours, theirs = base.network.eval()(input_ids=IDS).logits, reference(input_ids=IDS).logits
    assert torch.equal(ours, theirs)
    assert ours.shape == (1, 6, 320)


@pytest.mark.parametrize("family", [*ENCODERS, "llama", "gpt2"])
def test_a_classifier_of_every_family(family: str, tiny_model: TinyModel) -> None:
    """The head is new, from a seed of its own: the same at every site, whatever the global generator did."""
    folder = tiny_model(family)
    torch.manual_seed(123)
    base = load_base(Model(path=str(folder)), LABELS, "cpu")
    assert base.context == 64
    assert base.fresh
    head = "classifier" if family in ENCODERS else "score"
    assert any(module.startswith(head) for module in base.fresh)
    with torch.inference_mode():
        assert base.network.eval()(input_ids=IDS).logits.shape == (1, 3)
    first = {name: tensor.clone() for name, tensor in base.network.state_dict().items()}
    torch.manual_seed(456)
    again = load_base(Model(path=str(folder), revision="copy"), LABELS, "cpu")
    assert again.network is not base.network
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.network.state_dict().items())


def test_loading_does_not_move_the_global_generator(tiny_model: TinyModel) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_base(Model(path=str(tiny_model("bert")), revision="generator"), LABELS, "cpu")
    assert torch.equal(torch.rand(3), expected)


def test_a_base_is_loaded_once_per_process(tiny_model: TinyModel) -> None:
    model = Model(path=str(tiny_model("llama")))
    base = load_base(model, CausalLM(), "cpu")
    assert load_base(Model(path=str(tiny_model("llama"))), CausalLM(), "cpu") is base
    assert load_base(model, LABELS, "cpu") is not base


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_dtype_is_honored(family: str, name: str, dtype: torch.dtype, tiny_model: TinyModel) -> None:
    base = load_base(Model(path=str(tiny_model(family)), dtype=name), CausalLM(), "cpu")  # type: ignore[arg-type]
    assert {parameter.dtype for parameter in base.network.parameters()} == {dtype}
    with torch.inference_mode():
        assert torch.isfinite(base.network.eval()(input_ids=IDS).logits).all()


def test_cuda_is_refused_where_there_is_none(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ModelError, match=r"runtime.device=cuda, but torch sees no CUDA device; use runtime.device=auto"
    ):
        load_base(Model(path=str(tiny_model("llama"))), CausalLM(), "cuda")
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")


def test_the_digest_names_the_function_not_the_place(tiny_model: TinyModel, tmp_path: Path) -> None:
    original = tiny_model("llama")
    digest = base_digest(Model(path=str(original)))
    assert len(digest) == 64
    assert load_base(Model(path=str(original)), CausalLM(), "cpu").digest == digest
    copy = shutil.copytree(original, tmp_path / "copy")
    (copy / "README.md").write_text("not part of the function")
    # The old weight format is not loaded beside the new one, and not downloaded: it must not tell copies apart.
    torch.save({}, copy / "pytorch_model.bin")
    assert base_digest(Model(path=str(copy))) == digest


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_the_digest_changes_with_every_part(changed: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model("llama"), tmp_path / "copy")
    if changed == "model.safetensors":
        tensors = load_file(copy / changed)
        tensors["model.norm.weight"][0] += 1e-6
        save_file(tensors, copy / changed, metadata={"format": "pt"})
    else:
        (copy / changed).write_text((copy / changed).read_text() + " ")
    assert base_digest(Model(path=str(copy))) != base_digest(Model(path=str(tiny_model("llama"))))


def test_the_digest_covers_a_vocabulary_without_tokenizer_json(tiny_model: TinyModel, tmp_path: Path) -> None:
    digests = set()
    for number, vocabulary in enumerate(["[PAD]\nsore\nthroat\n", "[PAD]\nthroat\nsore\n"]):
        copy = shutil.copytree(tiny_model("bert"), tmp_path / str(number))
        (copy / "tokenizer.json").unlink()
        (copy / "vocab.txt").write_text(vocabulary)
        digests.add(base_digest(Model(path=str(copy))))
    assert len(digests) == 2


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a folder without config\.json; give one that save_pretrained wrote"):
        load_base(Model(path=str(tmp_path)), CausalLM(), "cpu")


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_missing_folder(path: str, offline_hub: Path) -> None:
    with pytest.raises(ModelError, match=rf"model\.path={path} does not exist; give a folder, a hub id, or embedded:"):
        load_base(Model(path=path), CausalLM(), "cpu")


def test_an_unknown_embedded_name() -> None:
    with pytest.raises(
        ModelError, match=r"unknown embedded name 'embedded:clinic-bass'; known names: embedded:clinic-"
    ):
        load_base(Model(path="embedded:clinic-bass"), CausalLM(), "cpu")


@pytest.mark.parametrize("hub_id", ["somebody/some-model", "gpt2", "not a valid id!"])
def test_a_hub_id_that_cannot_be_had(hub_id: str, offline_hub: Path) -> None:
    with pytest.raises(
        ModelError, match=r"is no local folder, and the model hub did not deliver it \(.+\); download it elsewhere and"
    ):
        load_base(Model(path=hub_id), CausalLM(), "cpu")


def test_a_hub_id_in_the_cache_needs_no_network(offline_hub: Path, tiny_model: TinyModel) -> None:
    put_in_cache(offline_hub, "somebody/tiny", tiny_model("llama"))
    base = load_base(Model(path="somebody/tiny"), CausalLM(), "cpu")
    assert base.digest == base_digest(Model(path=str(tiny_model("llama"))))
    assert load_tokenizer(Model(path="somebody/tiny")).vocab_size == 320


def test_a_revision_is_honored(offline_hub: Path, tiny_model: TinyModel) -> None:
    put_in_cache(offline_hub, "somebody/two", tiny_model("llama"))
    put_in_cache(offline_hub, "somebody/two", tiny_model("llama", seed=1), revision="v2")
    digests = [base_digest(Model(path="somebody/two", revision=revision)) for revision in (None, "v2")]
    assert digests == [base_digest(Model(path=str(tiny_model("llama", seed=seed)))) for seed in (0, 1)]
    assert digests[0] != digests[1]
    with pytest.raises(ModelError, match="did not deliver it"):
        base_digest(Model(path="somebody/two", revision="v3"))


def test_a_model_that_cannot_be_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model("llama"), tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"copy cannot be loaded for task=causal_lm: .*model\.safetensors"):
        load_base(Model(path=str(copy)), CausalLM(), "cpu")
    (copy / "config.json").write_text('{"model_type": "nothing-we-know"}')
    with pytest.raises(ModelError, match=r"cannot be loaded"):
        load_base(Model(path=str(copy)), CausalLM(), "cpu")


def test_a_head_of_another_size_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    network = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert"), num_labels=5)
    network.save_pretrained(tmp_path)
    load_tokenizer(Model(path=str(tiny_model("bert")))).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded for task=classification"):
        load_base(Model(path=str(tmp_path)), LABELS, "cpu")


def test_a_network_without_a_language_model_head_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Its head would be random, and frozen."""
    LlamaModel.from_pretrained(tiny_model("llama")).save_pretrained(tmp_path)
    load_tokenizer(Model(path=str(tiny_model("llama")))).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no weights for lm_head; task=causal_lm needs a language model"):
        load_base(Model(path=str(tmp_path)), CausalLM(), "cpu")


def test_padding_falls_back_to_the_end_of_text(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model("llama"), tmp_path / "copy")
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="</s>").save_pretrained(copy)
    base = load_base(Model(path=str(copy)), CausalLM(), "cpu")
    assert base.pad_token_id == base.tokenizer.eos_token_id == base.network.config.pad_token_id == 2
    assert load_tokenizer(Model(path=str(tiny_model("llama")))).pad_token_id == 0


def test_a_tokenizer_that_can_pad_with_nothing_is_refused(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model("llama"), tmp_path / "copy")
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer).save_pretrained(copy)
    with pytest.raises(ModelError, match=r"has neither a padding nor an end-of-text token; add one to it"):
        load_base(Model(path=str(copy)), CausalLM(), "cpu")


def test_a_broken_tokenizer_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model("llama"), tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer in \S+copy cannot be loaded"):
        load_base(Model(path=str(copy)), CausalLM(), "cpu")


def test_padding_positions_of_roberta_are_not_context(tiny_model: TinyModel) -> None:
    """Positions start after the padding index: 65 of them hold 64 tokens."""
    base = load_base(Model(path=str(tiny_model("roberta"))), LABELS, "cpu")
    assert base.network.config.max_position_embeddings == 65
    assert base.context == 64
    with torch.inference_mode():
        base.network(input_ids=torch.full((1, 64), 9))
        with pytest.raises((IndexError, RuntimeError), match="index"):
            base.network(input_ids=torch.full((1, 65), 9))


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_the_context_can_be_read_without_the_weights(family: str, tiny_model: TinyModel) -> None:
    model = Model(path=str(tiny_model(family)))
    task = LABELS if family in ENCODERS else CausalLM()
    assert stated_context(model) == load_base(model, task, "cpu").context == 64


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 48}}, 48),
        ({"model_type": "mpt", "max_seq_len": 48}, 48),
        ({"model_type": "mamba"}, None),
    ],
)
def test_where_a_context_is_stated(
    config: dict[str, object], context: int | None, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stated_context(Model(path=str(tmp_path))) == context


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"the configuration in .* cannot be read"):
        stated_context(Model(path=str(tmp_path)))
