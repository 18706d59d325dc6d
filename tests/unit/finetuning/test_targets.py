"""LoRA only where the task's loss depends on it: towers, shared keys, unused languages, experts, small layers."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from conf.schema.model import LoRA, Model
from conf.schema.strategy import FedIT
from conf.schema.task import CausalLM, Classification
from finetuning import models
from finetuning.adapters import AdaptedModel, attach
from finetuning.batches import collate
from finetuning.made_up import made_up_examples
from finetuning.memory import rank_that_fits, training_bytes
from finetuning.models import load_base
from finetuning.reached import reached_modules
from finetuning.shapes import trained_values
from finetuning.tasks.build import build_objective
from protocol.errors import ModelError

_spec = importlib.util.spec_from_file_location("architectures", Path(__file__).with_name("architectures.py"))
assert _spec is not None
assert _spec.loader is not None
architectures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architectures)

LABELS = Classification(labels=("no", "yes"))


@pytest.fixture
def adapted(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return `make(family, lora, task)`: a fresh base with an adapter."""

    def make(family: str, lora: LoRA | None = None, task: Any = None, **changes: Any) -> AdaptedModel:
        models._load.cache_clear()  # type: ignore[attr-defined]
        folder = tmp_path / family
        if not folder.exists():
            architectures.save(family, folder, tiny_tokenizer, **changes)
        task = task or CausalLM()
        return attach(load_base(Model(path=str(folder)), task, "cpu"), lora or LoRA(rank=4), task)

    return make


def layers(found: AdaptedModel) -> set[str]:
    return {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in found.names if ".lora_" in name}


def without_gradient(found: AdaptedModel, task: Any) -> set[str]:
    """Return the adapter's tensors without a gradient, both factors being away from zero."""
    base = found.base
    classes = None if task.labels is None else len(task.labels)
    examples = made_up_examples(base.tokenizer, base.vocabulary, (20, 15, 11, 8), classes=classes, seed=3)
    generator = torch.Generator().manual_seed(1)
    found.load({n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in found.initial(0).items()})
    found.train_only(found.names)
    found.network.eval()
    build_objective(task).losses(found.network, collate(examples, base.pad_token_id)).sum().backward()
    return {name for name, each in found.parameters.items() if each.grad is None or not each.grad.any()}


@pytest.mark.parametrize("family", ["gemma3 with vision", "gemma3n_text", "qwen2_moe", "mamba", "gpt2"])
def test_every_tensor_of_an_automatic_adapter_has_a_gradient(family: str, adapted: Any) -> None:
    found = adapted(family)
    assert len(layers(found)) >= 4
    assert without_gradient(found, CausalLM()) == set()


def test_no_adapter_on_a_tower_for_pictures(adapted: Any) -> None:
    found = adapted("gemma3 with vision")
    assert len(layers(found)) == 14
    assert all("language_model" in name for name in layers(found))
    assert any("vision_tower" in name for name, _ in found.base.network.named_modules())


def test_no_adapter_on_keys_of_a_layer_that_shares_anothers(adapted: Any) -> None:
    """Layers run, one after the other; that one of them leaves a part idle must not look like an expert."""
    names = layers(adapted("gemma3n_text"))
    assert "model.layers.0.self_attn.k_proj" in names
    assert "model.layers.1.self_attn.q_proj" in names
    assert not names & {"model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"}


def test_no_adapter_on_languages_that_are_not_chosen(adapted: Any) -> None:
    found = adapted("xmod", task=LABELS)
    assert any("en_XX" in name for name in layers(found))
    assert not any("de_DE" in name for name in layers(found))
    assert without_gradient(found, LABELS) == set()


@pytest.mark.parametrize("named", ["out_proj", "vision_tower.encoder.layers.0.self_attn.q_proj", "fc1"])
def test_naming_what_the_task_never_runs_is_refused(named: str, adapted: Any) -> None:
    with pytest.raises(
        ModelError, match=rf"peft.targets: {named} names \d module\(s\) that this task never runs, .*v_pr"
    ):
        adapted("gemma3 with vision", LoRA(rank=4, targets=(named,)))


def test_a_name_that_stands_for_both_means_those_that_run(adapted: Any) -> None:
    names = layers(adapted("gemma3 with vision", LoRA(rank=4, targets=("q_proj",))))
    assert names == {f"model.language_model.layers.{number}.self_attn.q_proj" for number in (0, 1)}


class Odd(nn.Module):
    """Experts of which a token takes one, and every way in which a layer's result is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(40))
        self.steps = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.dropped, self.detached, self.masked, self.bypassed = (nn.Linear(8, 8) for _ in range(4))
        self.late = nn.Linear(8, 8)
        self.closed = nn.Linear(8, 8)
        nn.init.zeros_(self.closed.weight)
        self.out = nn.Linear(8, 50)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        x = self.embed(input_ids)
        chosen = torch.stack([torch.stack([self.experts[int(i) % 40](v) for i, v in zip(ids, row, strict=True)])
                              for ids, row in zip(input_ids, x, strict=True)])  # fmt: skip
        x = self.steps[1](self.steps[0](x)) + chosen
        self.dropped(x)
        x = x + self.detached(x).detach() + self.masked(x) * 0.0 + nn.functional.linear(x, self.bypassed.weight)
        x = x + self.closed(self.late(x))
        return type("Output", (), {"logits": self.out(x)})()


def test_each_way_of_not_reaching_the_loss_is_seen(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    network = Odd().train()
    examples = made_up_examples(tiny_tokenizer, 50, (12, 9, 6, 4))
    batches = [collate(part, 0) for part in (examples, *([each] for each in examples))]
    before = torch.get_rng_state()
    found = reached_modules(network, build_objective(CausalLM()), batches[0], batches[1:])
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training
    assert not any(each._forward_hooks for each in network.modules())
    # Behind weights of zero there is no gradient now; there is one as soon as an adapter lies on them.
    assert {"embed", "out", "closed", "late", "steps.0", "steps.1"} <= found
    assert not found & {"dropped", "detached", "masked", "bypassed", "steps.2"}
    assert {f"experts.{number}.0" for number in range(40)} <= found


@pytest.mark.parametrize(
    ("rank", "left_out"), [(8, {"shared_expert_gate"}), (20, {"shared_expert_gate", "k_proj", "v_proj"})]
)
def test_layers_smaller_than_the_rank_are_left_out(rank: int, left_out: set[str], adapted: Any) -> None:
    whole = {name.rpartition(".")[2] for name in layers(adapted("qwen2_moe", LoRA(rank=1)))}
    found = {name.rpartition(".")[2] for name in layers(adapted("qwen2_moe", LoRA(rank=rank)))}
    assert whole - found == left_out
    with pytest.raises(ModelError, match=rf"peft.rank={rank} is above the size of \S+ \(1 x 32\); use at most 1"):
        adapted("qwen2_moe", LoRA(rank=rank, targets=("shared_expert_gate",)))


def test_mambas_small_and_bypassed_layers_are_left_out(adapted: Any) -> None:
    assert {name.rpartition(".")[2] for name in layers(adapted("mamba"))} == {"in_proj", "x_proj"}


def test_a_cut_of_a_plan_is_on_the_plans_layers(adapted: Any) -> None:
    base = adapted("qwen2_moe").base
    plan = LoRA(rank=20)
    own = layers(attach(base, plan, CausalLM()))
    assert layers(attach(base, plan.at_rank(4), CausalLM(), plan_rank=20)) == own
    assert layers(attach(base, plan.at_rank(4), CausalLM())) > own


@pytest.mark.parametrize("rank", [1, 8, 20])
@pytest.mark.parametrize("family", ["gemma3 with vision", "qwen2_moe", "mamba", "gemma3n_text"])
def test_the_count_of_a_plan_is_that_of_the_adapter(family: str, rank: int, adapted: Any, tmp_path: Path) -> None:
    lora = LoRA(rank=rank)
    found = sum(each.numel() for each in adapted(family, lora).parameters.values())
    assert trained_values(Model(path=str(tmp_path / family)), lora, FedIT(), CausalLM()) == found


def test_the_rank_that_fits_is_one_at_which_all_lower_ones_fit(adapted: Any, tmp_path: Path) -> None:
    adapted("qwen2_moe")
    path = str(tmp_path / "qwen2_moe")
    bytes_at = {
        rank: training_bytes(trained_values(Model(path=path), LoRA(rank=rank), FedIT(), CausalLM()) or 0, 8)
        for rank in (1, 2, 5)
    }
    assert rank_that_fits(path, CausalLM(), bytes_at[5]) == 5
    assert rank_that_fits(path, CausalLM(), bytes_at[5] - 1) == 4
    assert rank_that_fits(path, CausalLM(), bytes_at[1] - 1) == 0
