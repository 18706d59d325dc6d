"""What people train beside plain LoRA, and how they run it: each against a loop over single examples."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from finetuning.batches import Example, collate
from finetuning.tasks.build import build_objective
from finetuning.units import MicroBatches
from privacy.example_level import NativeGradients, OneByOneGradients
from privacy.gradients import gradient_rule
from privacy.randomness import SecureStream
from protocol.errors import PrivacyError

LENGTHS = (5, 17, 2, 29, 11, 17, 8)
MICRO_BATCHES = 2  # padded to 16 and to 32 tokens
FP32_BOUND = 1e-5
UNCLIPPED = 1e30
Make = Callable[..., Any]


def examples_for(family: str, make_examples: Make) -> list[Example]:
    return make_examples(LENGTHS, seed=3, classes=3 if family in ("bert", "roberta") else None)


def assert_exact(made: Any, examples: list[Example], error_of: Make, **grouping: Any) -> None:
    rule = made.rule()
    assert isinstance(rule, NativeGradients), "another rule took over: nothing of ours is compared"
    rule.close()
    for clip_norm in (0.05, UNCLIPPED):
        truth = made.one_at_a_time(examples, clip_norm)
        ours = made.batched(examples, clip_norm, **grouping)
        assert error_of(ours, truth) < FP32_BOUND
        for name in truth:
            assert truth[name].norm() > 0, f"{name} takes no gradient: nothing is compared"
            torch.testing.assert_close(ours[name], truth[name], rtol=1e-3, atol=1e-5 * float(truth[name].abs().max()))


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2", "bert"])
def test_dora(family: str, bench: Make, make_examples: Make, error_of: Make) -> None:
    made = bench(family, dora=True)
    assert any("magnitude" in name for name in made.trained)
    assert_exact(made, examples_for(family, make_examples), error_of)


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3", "bert"])
def test_lora_on_an_embedding(family: str, bench: Make, make_examples: Make, error_of: Make) -> None:
    embedding, linear = ("word_embeddings", "query") if family == "bert" else ("embed_tokens", "q_proj")
    made = bench(family, targets=(embedding, linear))
    assert sum("lora_embedding" in name for name in made.trained) == 2
    assert_exact(made, examples_for(family, make_examples), error_of)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "gpt2", "roberta"])
def test_norms_and_biases_beside_lora(family: str, bench: Make, make_examples: Make, error_of: Make) -> None:
    made = bench(family)
    more = {
        name: parameter
        for name, parameter in made.adapted.network.named_parameters()
        if "norm" in name.lower() or "ln_" in name or (name.endswith(".bias") and "k_proj" not in name)
    }
    # The bias of a key projection shifts all scores of a query alike, so its gradient is zero up to rounding.
    more = {name: each for name, each in more.items() if ".key." not in name and "modules_to_save" not in name}
    more = {name: each for name, each in more.items() if "original_module" not in name}
    made = replace(made, trained=made.trained | {name: each.requires_grad_() for name, each in more.items()})
    assert len(more) >= 4
    assert_exact(made, examples_for(family, make_examples), error_of)


def test_whole_embeddings_tied_to_the_head(bench: Make, make_examples: Make, error_of: Make) -> None:
    """One matrix is looked up at the start and multiplied by at the end: two layers, one gradient."""
    made = bench("qwen3")
    network = made.adapted.network
    weight = network.get_input_embeddings().weight
    assert network.get_output_embeddings().weight is weight
    made = replace(made, trained=made.trained | {"embedding": weight.requires_grad_()})
    assert_exact(made, examples_for("qwen3", make_examples), error_of)


@pytest.mark.parametrize(
    ("family", "name"), [("gpt2", "transformer.wpe"), ("bert", "bert.embeddings.position_embeddings")]
)
def test_a_position_embedding_is_trained_one_by_one(
    family: str, name: str, bench: Make, make_examples: Make, error_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """It is looked up once for the whole batch: its rows are no example's own."""
    made = bench(family)
    positions = made.adapted.network.base_model.model.get_submodule(name).weight.requires_grad_()
    made = replace(made, trained=made.trained | {name: positions})
    examples = examples_for(family, make_examples)
    with caplog.at_level(logging.WARNING):
        ours = made.batched(examples, 0.05)
    assert f"in native: base_model.model.{name} (Embedding); every layer is trained one by one" in caplog.text
    truth = made.one_at_a_time(examples, 0.05)
    assert truth[name].norm() > 0
    assert error_of(ours, truth) < FP32_BOUND


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("option", [{}, {"dora": True}, {"dropout": 0.2}])
def test_gradient_checkpointing_changes_nothing(
    reentrant: bool, option: dict[str, object], bench: Make, make_examples: Make, error_of: Make
) -> None:
    made = bench("llama", **option)
    examples = examples_for("llama", make_examples)
    plain = made.batched(examples, 0.05, seed=7)
    base = made.adapted.network.base_model.model
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()
    runs: list[int] = []
    counted = base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    try:
        assert error_of(made.batched(examples, 0.05, seed=7), plain) < FP32_BOUND
        assert len(runs) == 2 * MICRO_BATCHES, "nothing was recomputed"
    finally:
        counted.remove()
        base.gradient_checkpointing_disable()
        if reentrant:
            base.disable_input_require_grads()


@pytest.mark.parametrize("option", [{}, {"dora": True}])
def test_dropout_masks_are_the_same(
    option: dict[str, object], bench: Make, make_examples: Make, error_of: Make
) -> None:
    made = bench("llama", dropout=0.3, **option)
    batch = collate(make_examples(LENGTHS), made.adapted.base.pad_token_id)
    objective = build_objective(made.task)
    rule = made.rule(UNCLIPPED)
    made.adapted.network.train()
    torch.manual_seed(5)
    rule.accumulate(objective.losses(made.adapted.network, batch))
    rule.finish()
    rule.close()
    ours = {name: each.grad.double() for name, each in made.trained.items()}
    torch.manual_seed(5)
    total = objective.losses(made.adapted.network, batch).sum()
    parts = torch.autograd.grad(total, list(made.trained.values()))
    assert error_of(ours, dict(zip(made.trained, (part.double() for part in parts), strict=True))) < FP32_BOUND


@pytest.mark.parametrize("weighting", ["mean", "sum"])
@pytest.mark.parametrize("per_example", ["native", "opacus", "one_by_one"])
def test_a_unit_is_clipped_as_a_whole(
    weighting: str, per_example: str, bench: Make, make_examples: Make, error_of: Make, total_norm: Make
) -> None:
    """Against the definition: a user's gradients are combined first, and the combination is clipped."""
    made = bench("llama")
    examples = examples_for("llama", make_examples)
    units = [(3, 0), (1,), (), (5, 2, 4), (6,)]
    clip_norm = total_norm(made.gradient(examples[0])) / 3
    truth = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in made.trained.items()}
    for unit in filter(None, units):
        own = [made.gradient(examples[position]) for position in unit]
        share = 1 / len(unit) if weighting == "mean" else 1.0
        together = {name: share * sum(gradient[name] for gradient in own) for name in truth}
        factor = min(1.0, clip_norm / total_norm(together))
        truth = {name: truth[name] + factor * together[name] for name in truth}
    for tokens in (1, 60, 10_000):
        ours = made.batched(examples, clip_norm, per_example, tokens, units=units, mean=weighting == "mean")
        assert error_of(ours, truth) < FP32_BOUND


@pytest.mark.parametrize("per_example", ["native", "opacus", "one_by_one"])
@pytest.mark.parametrize("family", ["llama", "bert", "gemma3"])
def test_static_shapes_change_nothing(
    per_example: str, family: str, bench: Make, make_examples: Make, error_of: Make
) -> None:
    made = bench(family)
    examples = examples_for(family, make_examples)
    plain = made.batched(examples, 0.05, per_example)
    static = made.batched(examples, 0.05, per_example, 140, static_shapes=True, longest=33)
    assert error_of(static, plain) < FP32_BOUND
    pad = made.adapted.base.pad_token_id
    maker = MicroBatches.of(examples, None, pad, max_tokens=140, static_shapes=True, longest=33)
    assert {tuple(part.batch.input_ids.shape) for part in maker.of_step(range(7))} == {(4, 33)}


def test_a_second_backward_is_refused(bench: Make, make_examples: Make) -> None:
    made = bench("llama")
    rule = made.rule()
    batch = collate(make_examples(LENGTHS), made.adapted.base.pad_token_id)
    losses = build_objective(made.task).losses(made.adapted.network, batch)
    rule.accumulate(losses)
    with pytest.raises((PrivacyError, RuntimeError), match="second"):
        rule.accumulate(losses)
    rule.close()


def test_an_architecture_without_rules_trains_one_by_one(
    bench: Make, make_plan: Make, caplog: pytest.LogCaptureFixture
) -> None:
    made = bench("llama", dora=True, targets=("q_proj",))
    plan, network, stream = make_plan(1.0, 1.0), made.adapted.network, SecureStream.insecure(0)
    with caplog.at_level(logging.WARNING):
        rule = gradient_rule(plan, "opacus", network, made.trained, stream)
    assert isinstance(rule, OneByOneGradients)
    (warning,) = [record.getMessage() for record in caplog.records if "per-example" in record.getMessage()]
    assert warning.startswith("2 trained layer(s) have no per-example gradient rule in opacus: ")
    assert "q_proj.lora_magnitude_vector.default (DoraLinearLayer)" in warning
    assert warning.endswith("; every layer is trained one by one instead: exact, and slower on a GPU")
    with pytest.raises(
        PrivacyError, match=r"rule in opacus: \S+ \(DoraLinearLayer\), .*; set privacy\.per_example_gra"
    ):
        gradient_rule(plan, "opacus", network, made.trained, stream, without_rule="refuse")


def test_the_rules_forwards_are_there_until_it_is_closed(bench: Make) -> None:
    made = bench("llama", dora=True, targets=("q_proj",))
    held = [set(vars(module)) for module in made.adapted.network.modules()]
    rule = made.rule()
    linear = sum(type(module) is torch.nn.Linear for module in made.adapted.network.modules())
    others = [name for name in made.trained if "magnitude" in name]
    assert sum("forward" in vars(module) for module in made.adapted.network.modules()) == linear + len(others) > 3
    rule.close()
    assert [set(vars(module)) for module in made.adapted.network.modules()] == held
