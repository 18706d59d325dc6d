"""Tiny real models and tokenizers, and the folder of shared data, for every test that asks for them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from finetuning.batches import IGNORED, Example
from finetuning.tasks.build import build_objective

VOCABULARY, CONTEXT, HIDDEN = 320, 64, 32
SPECIAL = ("<pad>", "<s>", "</s>", "<cls>", "<sep>", "<unk>")
CAUSAL = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt2")
ENCODERS = ("bert", "roberta")
# How fast a machine is decides over no test: hypothesis' deadline and its check of slow data are measured in seconds.
settings.register_profile("cloister", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cloister")
CORPUS = (
    "the patient reports a sore throat and fever for three days",
    "mild chest pain on stairs, no known allergies, pulse normal",
    "wherefore art thou so pale, good night, sweet prince, the rest is silence",
    "this phone works well and the battery lasts a week, great value",
    "my card has not arrived yet, please tell me when the transfer is done",
)
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2, "head_dim": 8}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _SIZES | {"num_key_value_heads": 2},
    "qwen3": _GROUPED | {"tie_word_embeddings": True},
    "mistral": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": _GROUPED | {"query_pre_attn_scalar": 8},
    "gemma3_text": _GROUPED | {"query_pre_attn_scalar": 8},
    "phi": _SIZES | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
    "phi3": _SIZES | {"num_key_value_heads": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt2": {
        "n_embd": HIDDEN,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "bert": _SIZES | _NO_DROPOUT,
    "roberta": _SIZES | _NO_DROPOUT | {"max_position_embeddings": CONTEXT + 1},
}


def pytest_configure(config: pytest.Config) -> None:
    """Tiny models gain nothing from threads, and lose much where cores are few: here and in what tests start."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences, with every special token that a model may want."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<cls>",
        sep_token="<sep>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
    )


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """Return `make(family, folder=None, seed=0)`: a saved tiny model with its tokenizer.

    Without a folder, a family is made once per session.
    """
    made: dict[tuple[str, int], Path] = {}

    def make(family: str, folder: Path | None = None, seed: int = 0) -> Path:
        if folder is None and (family, seed) in made:
            return made[family, seed]
        target = folder or tmp_path_factory.mktemp(f"{family}-{seed}")
        kind = "gemma3_text" if family == "gemma3" else family
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        # Larger weights than usual: a tiny network at 0.02 is nearly the identity, and would hide differences.
        config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, initializer_range=0.15, **special, **_CONFIGS[kind])
        auto = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            auto.from_config(config).save_pretrained(target)
        tiny_tokenizer.save_pretrained(target)
        if folder is None:
            made[family, seed] = target
        return target

    return make


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[Example]]:
    """Return `make(lengths, seed=0, classes=None)`: examples of random tokens; some begin with an untrained prompt."""

    def make(lengths: Sequence[int], seed: int = 0, classes: int | None = None) -> list[Example]:
        generator = np.random.default_rng(seed)
        examples: list[Example] = []
        for length in lengths:
            ids = generator.integers(len(SPECIAL), VOCABULARY, size=length).astype(np.int32)
            trained = np.arange(length) >= generator.integers(0, max(length // 2, 1))
            label = None if classes is None else int(generator.integers(classes))
            examples.append(Example(ids, trained if classes is None else np.zeros(length, dtype=np.bool_), label))
        return examples

    return make


@pytest.fixture(scope="session")
def coupled_objective() -> Callable[[Any], Any]:
    """Return what may stand for `build_objective`: each loss is divided by the tokens of the whole micro-batch."""

    def build(task: Any) -> Any:
        objective = build_objective(task)

        class Coupled(type(objective)):
            def losses(self, network: Any, batch: Any) -> torch.Tensor:
                tokens = (batch.targets[:, 1:] != IGNORED).sum(dim=1)
                return objective.losses(network, batch) * tokens * batch.size / tokens.sum()

        return Coupled()

    return build


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and small real models: CLOISTER_SHARED_DATA, or shared/data beside the repository."""
    named = os.environ.get("CLOISTER_SHARED_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} does not exist; set CLOISTER_SHARED_DATA")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what is quick first and what is marked as slow last, so that a plain mistake shows within a minute."""
    folders = ("architecture", "config", "unit", "conformance", "golden", "parity", "privacy", "rounds", "real")
    slow = ("deployment", "browser", "slow")

    def when(item: pytest.Item) -> tuple[bool, int]:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        place = folders.index(folder) if folder in folders else len(folders)
        return any(item.get_closest_marker(name) for name in slow), place

    items.sort(key=when)
