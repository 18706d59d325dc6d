"""Trained values counted from checkpoint headers against the adapter that is really attached."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conf.schema.model import LoRA, Model
from conf.schema.strategy import FedIT, FedSVD, FFALoRA, RoLoRA, Strategy
from conf.schema.task import CausalLM, Classification
from finetuning.adapters import attach
from finetuning.models import load_base
from finetuning.shapes import trained_values
from strategies.build import build_strategy


@pytest.mark.parametrize(
    ("family", "strategy", "lora"),
    [
        ("llama", FedIT(), {}),
        ("llama", FFALoRA(), {"targets": ("q_proj", "down_proj")}),
        ("llama", FFALoRA(), {"targets": ("embed_tokens",)}),
        ("qwen3", FFALoRA(), {}),
        ("phi3", FFALoRA(), {}),
        ("gpt2", FFALoRA(), {}),
        ("llama", FedSVD(), {}),
        ("llama", RoLoRA(), {}),
        ("gpt2", FedIT(), {"dora": True}),
        ("bert", FFALoRA(), {}),
        ("roberta", FedIT(), {}),
    ],
)
def test_the_count_is_that_of_the_attached_adapter(
    family: str, strategy: Strategy, lora: dict[str, object], tiny_model: Callable[..., Path]
) -> None:
    task = Classification(labels=("a", "b", "c")) if family in ("bert", "roberta") else CausalLM()
    model, peft = Model(path=str(tiny_model(family))), LoRA.model_validate({"rank": 3, **lora})
    adapted = attach(load_base(model, task, "cpu"), peft, task)
    trained = build_strategy(strategy).trained(adapted.names, 1)
    assert trained_values(model, peft, strategy, task) == sum(adapted.parameters[name].numel() for name in trained)


def test_a_model_that_is_not_here_has_no_count(tmp_path: Path) -> None:
    for path in ("nobody/nothing-of-that-name", str(tmp_path), "embedded:nothing"):
        assert trained_values(Model(path=path), LoRA(), FedIT(), CausalLM()) is None
