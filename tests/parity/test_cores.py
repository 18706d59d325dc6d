"""Per-example gradients of square cores against one example at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema.model import LoRA, Model
from conf.schema.task import CausalLM, Classification
from finetuning.adapters import attach
from finetuning.models import load_base

Make = Callable[..., Any]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("cores", "scales"), [(1, False), (3, True)])
def test_every_way_agrees(
    family: str,
    cores: int,
    scales: bool,
    bench: Make,
    make_examples: Make,
    error_of: Make,
    tiny_model: Callable[..., Path],
) -> None:
    kind = type(bench(family))
    task = Classification(labels=("left", "middle", "right")) if family == "bert" else CausalLM()
    base = load_base(Model(path=str(tiny_model(family))), task, "cpu")
    adapted = attach(base, LoRA(rank=6, alpha=8.0), task, cores)
    generator = torch.Generator().manual_seed(1)
    adapted.load({n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in adapted.initial(3).items()})
    wanted = {n for n in adapted.names if n.endswith("lora_core") or (scales and n.endswith("_scale"))}
    assert wanted
    made = kind(adapted, adapted.train_only(frozenset(wanted)), task)
    examples = make_examples((5, 9, 3, 1), classes=3 if family == "bert" else None)
    truth = made.one_at_a_time(examples, 0.05)
    assert all(tensor.norm() > 0 for tensor in truth.values())
    for way in ("native", "one_by_one"):
        assert error_of(made.batched(examples, 0.05, per_example=way), truth) < 1e-4, way
