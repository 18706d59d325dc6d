"""Per-example gradients beside a frozen offset, by all three ways, against one example at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from protocol.offsets import offset_names

Make = Callable[..., Any]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_way_agrees_beside_an_offset(family: str, bench: Make, make_examples: Make, error_of: Make) -> None:
    made = bench(family)
    examples = make_examples((5, 9, 3), classes=3 if family == "bert" else None)
    plain = made.one_at_a_time(examples, 0.05)
    adapter, generator = made.adapted.extract(), torch.Generator().manual_seed(4)
    offsets: dict[str, torch.Tensor] = {}
    for name in adapter:
        module, found, _ = name.partition(".lora_B")
        if found:
            left, right = offset_names(module)
            offsets[left] = 0.2 * torch.randn(adapter[name].shape[0], 6, generator=generator)
            offsets[right] = 0.2 * torch.randn(6, adapter[f"{module}.lora_A.weight"].shape[1], generator=generator)
    made.adapted.load({**adapter, **offsets})
    truth = made.one_at_a_time(examples, 0.05)
    assert error_of(plain, truth) > 0.1, "the offset changes the gradients"
    for way in ("native", "opacus", "one_by_one"):
        assert error_of(made.batched(examples, 0.05, per_example=way), truth) < 1e-4, way
    made.adapted.load(adapter)
