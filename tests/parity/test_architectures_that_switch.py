"""Networks that do something else by length, by what was seen, or by the values of their rows.

What they switch on must not make one record's gradient depend on another's, nor be met for the first time in a round
that was booked.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5EncoderModel

from client.dry_run import probed_lengths, way_of_gradients
from conf.schema.model import LoRA, Model
from conf.schema.privacy import ExampleLevel
from conf.schema.site import SiteRuntime
from conf.schema.task import CausalLM
from finetuning.adapters import attach
from finetuning.models import load_base
from finetuning.tasks.build import build_objective
from privacy.gradients import gradient_rule
from privacy.per_example import layers_without_native_rule
from privacy.randomness import SecureStream
from protocol.errors import PrivacyError

Make = Callable[..., Any]
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SWITCH = 32
"""The length above which these models turn positions otherwise."""
LONGROPE = {
    "original_max_position_embeddings": SWITCH,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 8.0]},
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
DYNAMIC = {"max_position_embeddings": SWITCH, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def made(tmp_path: Path, tiny_tokenizer: Any, bench: Make) -> Make:
    """Return `make(kind, **config)`: the bench's network exchanged for one of that configuration."""

    def make(kind: str, **config: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | config)))
        network.save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        lora = LoRA(rank=4, alpha=8.0, targets=("q_proj", "v_proj") if "moe" in kind else "auto")
        adapted = attach(load_base(Model(path=str(tmp_path)), CausalLM(), "cpu"), lora, CausalLM())
        generator = torch.Generator().manual_seed(11)
        adapted.load({n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in adapted.initial(3).items()})
        return type(bench("llama"))(adapted, adapted.train_only(adapted.names), CausalLM())

    return make


def way_of(bench: Any, plan: Any, longest: int | None = None) -> str:
    asked = ExampleLevel(noise_multiplier=1.0)
    objective = build_objective(bench.task)
    return way_of_gradients(plan, asked, bench.adapted, bench.trained, objective, SiteRuntime(), longest=longest)


def test_rotary_factors_that_follow_the_longest_of_the_batch(
    made: Make, make_examples: Make, make_plan: Make, error_of: Make, total_norm: Make
) -> None:
    """Phi-3's longrope: a long record beside a short one must not turn the short one's positions otherwise."""
    here = made("phi3", **LONGROPE)
    assert way_of(here, make_plan(1.0, 1.0)) == "native"
    examples = make_examples([9, 30, 12, 31, 22, 100], seed=1)
    clip_norm = 0.7 * min(total_norm(here.gradient(each)) for each in examples)
    truth = here.one_at_a_time(examples, clip_norm)
    for tokens in (1, 64, 8192):
        assert error_of(here.batched(examples, clip_norm, micro_batch_tokens=tokens), truth) < 1e-5
    whole, rest = here.batched(examples, clip_norm), here.batched(examples[:-1], clip_norm)
    assert total_norm({name: whole[name] - rest[name] for name in whole}) <= clip_norm * (1 + 1e-6)
    # The control: padded beyond the switch, as beside a long record, the short one's gradient is another.
    beyond = here.batched(examples[:1], 1e30, static_shapes=True, longest=SWITCH + 1)
    assert error_of(beyond, here.gradient(examples[0])) > 1e-3


def test_rotary_factors_that_grow_with_what_was_seen(made: Make, make_plan: Make) -> None:
    """Dynamic scaling keeps the longest length that it saw: a record's gradient depends on who came before."""
    here = made("llama", **DYNAMIC)
    here = replace(here, adapted=replace(here.adapted, base=replace(here.adapted.base, context=None)))
    with pytest.raises(PrivacyError, match=r"^the network remembers the examples it saw: a dry run changed .*, so one"):
        way_of(here, make_plan(1.0, 1.0), longest=100)
    here.adapted.checked.clear()
    assert way_of(here, make_plan(1.0, 1.0), longest=SWITCH) == "native"


@pytest.mark.parametrize("tokens", [16, 32, 8192])
@pytest.mark.parametrize("way", ["native", "one_by_one"])
def test_also_where_a_micro_batch_holds_less(way: str, tokens: int, made: Make, make_plan: Make) -> None:
    """A longer record has a micro-batch of its own, and is remembered all the same."""
    here = made("llama", **DYNAMIC)
    here = replace(here, adapted=replace(here.adapted, base=replace(here.adapted.base, context=None)))
    asked = ExampleLevel(noise_multiplier=1.0, per_example_gradients=way)
    runtime, objective = SiteRuntime(micro_batch_tokens=tokens), build_objective(here.task)
    with pytest.raises(PrivacyError, match="the network remembers the examples it saw"):
        way_of_gradients(make_plan(1.0, 1.0), asked, here.adapted, here.trained, objective, runtime, longest=100)


class Longest(nn.Module):
    """Does something else once the longest record of the batch, padding aside, has more than `tokens` tokens."""

    def __init__(self, inner: nn.Module, tokens: int) -> None:
        super().__init__()
        self.inner, self.tokens, self.seen = inner, tokens, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (3.0 if self.seen > self.tokens else 1.0)


@pytest.mark.parametrize("tokens", [36, 40, 46])
def test_a_switch_by_the_longest_of_the_batch_within_one_padded_length(
    tokens: int, bench: Make, make_examples: Make, total_norm: Make
) -> None:
    here = bench("gpt2")
    network, at = here.adapted.network, "base_model.model.transformer.h.0.mlp"
    inner, switch = network.get_submodule(at), Longest(network.get_submodule(at), tokens)
    network.set_submodule(at, switch)
    here.adapted.checked.clear()

    def look(_: object, __: object, given: dict[str, Any]) -> None:
        switch.seen = int(given["attention_mask"].sum(1).max())

    handle = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        examples = make_examples([34, 33, 35, 34, 33, 36, 47], seed=4)
        clip_norm = 0.5 * min(total_norm(here.gradient(each)) for each in examples)
        whole, rest = here.batched(examples, clip_norm), here.batched(examples[:-1], clip_norm)
        assert total_norm({name: whole[name] - rest[name] for name in whole}) <= clip_norm * (1 + 1e-6)
    finally:
        handle.remove()
        network.set_submodule(at, inner)
        here.adapted.checked.clear()


class SharedMask(nn.Module):
    """Drops out a table that the whole batch shares, as DeBERTa does with its distances."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.drop, self.table = inner, nn.Dropout(0.2), torch.zeros(7, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.drop(self.table).sum()


def test_a_mask_that_a_batch_shares(bench: Make, make_plan: Make, caplog: pytest.LogCaptureFixture) -> None:
    here = bench("llama")
    network, at = here.adapted.network, "base_model.model.model.layers.0.mlp"
    inner = network.get_submodule(at)
    network.set_submodule(at, SharedMask(inner))
    here.adapted.checked.clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert way_of(here, make_plan(1.0, 1.0)) == "one_by_one"
        assert f"{at}.drop drops out the same values for all examples of a batch" in caplog.text
    finally:
        network.set_submodule(at, inner)
        here.adapted.checked.clear()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_experts_that_tokens_choose(
    kind: str, made: Make, make_plan: Make, make_examples: Make, error_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Which tokens an expert multiplies together depends on all records of the batch, if by rounding only."""
    more = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    here = made(kind, **(EXPERTS | (more if kind == "qwen2_moe" else {})))
    attention = {name: each for name, each in here.trained.items() if "self_attn" in name}
    here = type(here)(here.adapted, here.adapted.train_only(frozenset(attention)), here.task)
    with caplog.at_level(logging.WARNING):
        assert way_of(here, make_plan(1.0, 1.0)) == "one_by_one"
    assert "the network picks rows by what they hold (" in caplog.text
    examples = make_examples([9, 14, 6])
    assert error_of(here.batched(examples, 0.05, "one_by_one"), here.one_at_a_time(examples, 0.05)) < 1e-5


def test_a_table_of_distances_has_no_rule_however_many_rows_it_has() -> None:
    """T5 looks its distances up once for a batch: as many rows as positions, which may be as many as examples."""
    network = T5EncoderModel(T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    trained = {name: network.get_submodule(name).weight}
    assert layers_without_native_rule(network, trained) == [f"{name} (Embedding)"]
    tokens = {"shared.weight": network.get_input_embeddings().weight}
    assert layers_without_native_rule(network, tokens) == []


class Counted(nn.Module):
    """A table that is looked up with as many numbers as there are examples, none of which is an example's own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.table = inner, nn.Embedding(64, 32)

    def get_input_embeddings(self) -> nn.Module:
        return self.inner


def test_nor_has_any_other_table_beside_the_tokens(make_plan: Make, caplog: pytest.LogCaptureFixture) -> None:
    network = Counted(nn.Embedding(64, 32))
    rule = gradient_rule(
        make_plan(1.0, 1.0), "native", network, {"table.weight": network.table.weight}, SecureStream.insecure(0)
    )
    rule.close()
    assert rule.max_micro_batch == 1
    assert "no per-example gradient rule in native: table (Embedding)" in caplog.text


def test_the_lengths_that_are_tried() -> None:
    assert probed_lengths(100) == ((9, 6, 4), (18, 31, 23, 27, 20), (33,), (65,), (100,))
    assert probed_lengths(24) == ((9, 6, 4), (18, 24, 23, 24, 20))
    assert probed_lengths(1000)[-2:] == ((513,), (1000,))
    assert all(len(batch) not in batch for batch in probed_lengths(4096) if len(batch) > 1)
