"""The fast clipped sum of per-example gradients against a loop over single examples with plain autograd."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetuning.batches import Example, collate
from finetuning.tasks.build import build_objective
from privacy.ghost_clipping import GhostGradients
from privacy.randomness import SecureStream

CAUSAL = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt2")
ENCODERS = ("bert", "roberta")
LENGTHS = (5, 17, 2, 29, 11, 17, 8)
FP32_BOUND = 1e-5
UNCLIPPED = 1e30
"""No gradient here is that long. (Infinity itself times a noise multiplier of zero is NaN.)"""
Make = Callable[..., Any]


def examples_for(family: str, make_examples: Make, seed: int = 0) -> list[Example]:
    return make_examples(LENGTHS, seed=seed, classes=3 if family in ENCODERS else None)


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
@pytest.mark.parametrize("strategy", ["fedit", "ffa_lora"])
def test_native_equals_one_example_at_a_time(
    family: str, strategy: str, bench: Make, make_examples: Make, error_of: Make, total_norm: Make
) -> None:
    made = bench(family, strategy)
    examples = examples_for(family, make_examples)
    norms = [total_norm(made.gradient(example)) for example in examples]
    between = math.sqrt(min(norms) * max(norms))
    assert min(norms) < between < max(norms)
    for clip_norm in (min(norms) / 7, between, UNCLIPPED):
        ours, truth = made.batched(examples, clip_norm), made.one_at_a_time(examples, clip_norm)
        assert error_of(ours, truth) < FP32_BOUND
        for name in truth:
            assert truth[name].norm() > 0, f"{name} takes no gradient: nothing is compared"
            torch.testing.assert_close(ours[name], truth[name], rtol=1e-3, atol=1e-5 * float(truth[name].abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "roberta"])
def test_one_by_one_equals_the_definition(family: str, bench: Make, make_examples: Make, error_of: Make) -> None:
    made = bench(family)
    examples = examples_for(family, make_examples)
    for clip_norm in (0.05, UNCLIPPED):
        ours = made.batched(examples, clip_norm, per_example="one_by_one")
        assert error_of(ours, made.one_at_a_time(examples, clip_norm)) < FP32_BOUND


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert"])
@pytest.mark.parametrize("strategy", ["fedit", "ffa_lora"])
def test_native_equals_opacus(family: str, strategy: str, bench: Make, make_examples: Make, error_of: Make) -> None:
    """A second oracle, which shares no code with the first."""
    made = bench(family, strategy)
    examples = examples_for(family, make_examples)
    theirs = made.batched(examples, 0.05, per_example="opacus")
    assert error_of(made.batched(examples, 0.05), theirs) < FP32_BOUND


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ghost_clipping_that_is_measured_against_is_the_same_sum(
    family: str, bench: Make, make_examples: Make, make_plan: Make, error_of: Make, total_norm: Make
) -> None:
    made = bench(family)
    examples = make_examples(LENGTHS)
    halves = [collate(part, made.adapted.base.pad_token_id) for part in (examples[:4], examples[4:])]
    norms = [total_norm(made.gradient(example)) for example in examples]
    # Between two norms: at one of them, rounding, which memory and threads change, says whether that record is clipped.
    clip_norm = math.sqrt(min(norms) * max(norms))
    assert all(abs(norm / clip_norm - 1) > 1e-3 for norm in norms)
    made.adapted.network.train()
    plan, stream = make_plan(clip_norm, 0.0), SecureStream.insecure(0)
    rule = GhostGradients(plan, made.adapted.network, made.trained, stream)
    try:
        for half in halves:
            rule.accumulate(build_objective(made.task).losses(made.adapted.network, half))
        rule.finish()
        ours = {name: each.grad.double() for name, each in made.trained.items()}
        assert rule.clipped == sum(norm > clip_norm for norm in norms)
        assert 0 < rule.clipped < len(examples)
        with pytest.raises(ValueError, match="one example per unit, and no padding"):
            rule.accumulate(torch.ones(2), torch.tensor([0, 0]))
    finally:
        rule.close()
        for parameter in made.trained.values():
            parameter.grad = None
    assert error_of(ours, made.one_at_a_time(examples, clip_norm)) < FP32_BOUND
    assert not any(module._backward_hooks for module in made.adapted.network.modules())


@pytest.mark.parametrize("option", [{"rslora": True, "rank": 8}, {"targets": ("q_proj", "down_proj")}, {"rank": 1}])
def test_other_adapters(option: dict[str, object], bench: Make, make_examples: Make, error_of: Make) -> None:
    made = bench("llama", **option)
    examples = examples_for("llama", make_examples)
    assert error_of(made.batched(examples, 0.05), made.one_at_a_time(examples, 0.05)) < FP32_BOUND


def test_rslora_and_lora_differ(bench: Make, make_examples: Make, error_of: Make) -> None:
    """The scale reaches the gradient: α/√r is twice α/r at rank 4."""
    examples = make_examples(LENGTHS)
    plain = bench("llama", "ffa_lora").batched(examples, UNCLIPPED)
    scaled = bench("llama", "ffa_lora", rslora=True).batched(examples, UNCLIPPED)
    assert error_of(plain, scaled) > 0.3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_decoder_with_a_classification_head(family: str, bench: Make, make_examples: Make, error_of: Make) -> None:
    """The head reads the last token before the padding, so padding would show here first."""
    made = bench(family, task="classification")
    assert any("score" in name for name in made.trained)
    examples = make_examples(LENGTHS, classes=3)
    for clip_norm in (0.05, UNCLIPPED):
        truth = made.one_at_a_time(examples, clip_norm)
        assert error_of(made.batched(examples, clip_norm), truth) < FP32_BOUND


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "roberta"])
def test_padding_and_micro_batches_change_nothing(
    family: str, bench: Make, make_examples: Make, error_of: Make
) -> None:
    made = bench(family)
    examples = examples_for(family, make_examples)
    together = made.batched(examples, 0.05, micro_batch_tokens=10_000)
    for tokens in (1, 40, 60):
        assert error_of(made.batched(examples, 0.05, micro_batch_tokens=tokens), together) < FP32_BOUND
    assert error_of(made.batched(examples[::-1], 0.05, micro_batch_tokens=40), together) < FP32_BOUND


@pytest.mark.parametrize(
    ("family", "dtype", "bound"),
    [
        ("llama", "bf16", 0.02),
        ("gpt2", "bf16", 0.02),
        ("bert", "bf16", 0.02),
        ("llama", "fp16", 0.005),
        ("bert", "fp16", 0.005),
    ],
)
def test_a_16_bit_base_keeps_a_32_bit_adapter(
    family: str, dtype: str, bound: float, bench: Make, make_examples: Make, error_of: Make
) -> None:
    """A 16-bit base rounds activations, and padding changes the rounding; the adapter's gradients stay float32."""
    made = bench(family, dtype=dtype)
    assert all(parameter.dtype == torch.float32 for parameter in made.trained.values())
    examples = examples_for(family, make_examples)
    assert error_of(made.batched(examples, 0.05), made.one_at_a_time(examples, 0.05)) < bound
    # Without padding and with one example per batch the arithmetic is the same, so only float32 sums differ.
    alone = made.batched(examples, 0.05, micro_batch_tokens=1)
    assert error_of(alone, made.batched(examples, 0.05, per_example="one_by_one")) < bound


def test_dropout_is_drawn_per_example_upstream_of_the_factors(bench: Make, make_examples: Make, error_of: Make) -> None:
    """With dropout the sums are random, but one micro-batch's hooks must still equal autograd on the same draw."""
    made = bench("llama", dropout=0.3)
    examples = make_examples(LENGTHS)
    batch = collate(examples, made.adapted.base.pad_token_id)
    made.adapted.network.train()
    objective = build_objective(made.task)
    rule = made.rule(UNCLIPPED)
    try:
        torch.manual_seed(5)
        rule.accumulate(objective.losses(made.adapted.network, batch))
        rule.finish()
        ours = {name: each.grad.double() for name, each in made.trained.items()}
    finally:
        rule.close()
    torch.manual_seed(5)
    total = objective.losses(made.adapted.network, batch).sum()
    parts = torch.autograd.grad(total, list(made.trained.values()))
    assert error_of(ours, dict(zip(made.trained, (part.double() for part in parts), strict=True))) < FP32_BOUND


def test_the_network_is_left_as_it_was_found(bench: Make, make_examples: Make) -> None:
    made = bench("llama")
    hooks = sum(len(m._forward_hooks) + len(m._backward_hooks) for m in made.adapted.network.modules())
    before = made.adapted.extract()
    made.batched(make_examples(LENGTHS))
    assert sum(len(m._forward_hooks) + len(m._backward_hooks) for m in made.adapted.network.modules()) == hooks
    assert all(getattr(parameter, "grad_sample", None) is None for parameter in made.adapted.network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.adapted.extract().items())
