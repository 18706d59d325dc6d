"""Token ids, positions and classes that a network has no room for are found before anything is spent."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from conf.schema.model import Model
from conf.schema.task import CausalLM, Classification
from finetuning import models
from finetuning.batches import Example
from finetuning.models import FrozenBase, load_base
from finetuning.vocabulary import check_fits
from protocol.errors import ModelError

TinyModel = Callable[..., Path]


@pytest.fixture
def with_tokens(tiny_model: TinyModel, tmp_path: Path) -> Callable[..., Path]:
    """Return `make(add)`: a tiny Llama whose tokenizer a function added tokens to, and whose embedding did not grow."""

    def make(add: Callable[[Any], Any]) -> Path:
        models._load.cache_clear()  # type: ignore[attr-defined]
        folder = shutil.copytree(tiny_model("llama"), tmp_path / "copy")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        add(tokenizer)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("add", "highest", "first"),
    [
        (lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}), 320, r"\[PAD\]"),
        (lambda tokenizer: tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True), 321, "im_start"),
        (lambda tokenizer: tokenizer.add_tokens(["antidepressant"]), 320, "antidepressant"),
        (lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<|end|>"}), 320, "end"),
    ],
)
def test_tokens_without_a_row(add: Any, highest: int, first: str, with_tokens: Any) -> None:
    folder = with_tokens(add)
    message = rf"has ids up to {highest}, the network an embedding of 320 rows; .* the first is '\S*{first}\S*' \(320\)"
    with pytest.raises(ModelError, match=message):
        load_base(Model(path=str(folder)), CausalLM(), "cpu")


def test_a_placeholder_for_pictures_needs_no_row(with_tokens: Any) -> None:
    """As in text-only releases of models that also read pictures."""
    folder = with_tokens(lambda tokenizer: tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True))
    assert load_base(Model(path=str(folder)), CausalLM(), "cpu").vocabulary == 320


@pytest.fixture
def base(tiny_model: TinyModel) -> FrozenBase:
    return load_base(Model(path=str(tiny_model("llama"))), CausalLM(), "cpu")


def example(ids: list[int], label: int | None = None) -> Example:
    return Example(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_), label)


def test_records_that_do_not_fit(base: FrozenBase) -> None:
    check_fits(base, [example([5, 319]), example([7] * 64)])
    check_fits(base, [])
    with pytest.raises(ModelError, match=r"token ids up to 320, the network an embedding of 320 rows"):
        check_fits(base, [example([5]), example([5, 320])])
    with pytest.raises(
        ModelError, match=r"up to 65 tokens, the network 64 positions; set data.max_length to at most 64"
    ):
        check_fits(base, [example([5] * 65)])
    check_fits(replace(base, context=None), [example([5] * 65)])
    check_fits(base, [example([5], 1)], classes=2)
    with pytest.raises(ModelError, match=r"classes up to 2, the head has 2"):
        check_fits(base, [example([5], 2)], classes=2)


def test_a_table_of_positions_bounds_the_context_whatever_the_configuration_says(tiny_model: TinyModel) -> None:
    for family in ("bert", "roberta"):
        models._load.cache_clear()  # type: ignore[attr-defined]
        assert load_base(Model(path=str(tiny_model(family))), Classification(labels=("a", "b")), "cpu").context == 64
