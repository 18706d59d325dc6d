"""Layers whose per-example gradients nobody can vouch for are named before anything is spent."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from conf.schema.model import LoRA, Model
from conf.schema.task import CausalLM, Classification
from finetuning.adapters import AdaptedModel, attach
from finetuning.models import load_base
from privacy.example_level import OneByOneGradients, OpacusGradients, layers_without_opacus_rule
from privacy.gradients import gradient_rule
from privacy.per_example import layers_without_native_rule
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream
from privacy.sampling import PoissonSampling
from protocol.errors import PrivacyError

PLAN = PrivacyPlan("record", "add or remove one record", PoissonSampling(0.5, 100), 1.0, 1.0, 4.0, 1, 1, 1e-5)


@pytest.fixture
def adapted(tiny_model: Callable[..., Path]) -> Callable[..., AdaptedModel]:
    def make(family: str = "llama", **options: object) -> AdaptedModel:
        task = Classification(labels=("a", "b")) if family in ("bert", "roberta") else CausalLM()
        base = load_base(Model(path=str(tiny_model(family))), task, "cpu")
        made = attach(base, LoRA.model_validate({"rank": 4, **options}), task)
        made.train_only(made.names)
        return made

    return make


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "roberta"])
def test_plain_lora_has_a_rule_for_everything(family: str, adapted: Callable[..., AdaptedModel]) -> None:
    made = adapted(family)
    assert layers_without_opacus_rule(made.network) == []
    assert layers_without_native_rule(made.network, made.parameters) == []


def test_opacus_knows_no_dora(adapted: Callable[..., AdaptedModel]) -> None:
    made = adapted(dora=True, targets=("q_proj",))
    found = layers_without_opacus_rule(made.network)
    assert len(found) == 2
    assert all("lora_magnitude_vector" in name and name.endswith("(DoraLinearLayer)") for name in found)
    assert layers_without_native_rule(made.network, made.parameters) == []


def test_opacus_knows_no_lora_on_an_embedding(adapted: Callable[..., AdaptedModel]) -> None:
    made = adapted(targets=("embed_tokens", "q_proj"))
    found = layers_without_opacus_rule(made.network)
    assert len(found) == 2
    assert all("lora_embedding_" in name and "(ParameterDict)" in name for name in found)
    assert layers_without_native_rule(made.network, made.parameters) == []


def test_dora_on_an_embedding_is_named(adapted: Callable[..., AdaptedModel]) -> None:
    made = adapted(dora=True, targets=("embed_tokens", "q_proj"))
    found = layers_without_native_rule(made.network, made.parameters)
    assert [name.rpartition(".")[2] for name in found] == ["embed_tokens (Embedding)", "default (DoraEmbeddingLayer)"]


def test_a_frozen_layer_needs_no_rule(adapted: Callable[..., AdaptedModel]) -> None:
    made = adapted(targets=("embed_tokens", "q_proj"))
    made.train_only(frozenset(name for name in made.names if "q_proj" in name))
    assert layers_without_opacus_rule(made.network) == []


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False), nn.BatchNorm2d(3)])
@pytest.mark.parametrize("per_example", ["native", "opacus", "one_by_one"])
def test_a_batch_norm_is_refused_even_when_frozen(norm: nn.Module, per_example: str) -> None:
    """It mixes the examples of a batch, whoever trains."""
    network = nn.Sequential(nn.Linear(3, 3), norm.requires_grad_(False))
    trained = dict(network[0].named_parameters())
    with pytest.raises(
        PrivacyError, match=rf"^1 \({type(norm).__name__}\) mixes the examples of a batch, .* without batch norm \("
    ):
        gradient_rule(PLAN, per_example, network, trained, SecureStream.insecure(0))


def test_opacus_meets_a_module_with_a_parameter_of_its_own() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

    class MyLinear(nn.Linear):
        """A subclass may compute anything."""

    network = nn.Sequential(Scale(), nn.Linear(2, 2), MyLinear(2, 2))
    assert layers_without_opacus_rule(network) == ["0 (Scale)", "2 (MyLinear)"]


@pytest.mark.parametrize("per_example", ["native", "opacus"])
def test_the_refusal_says_what_to_do(per_example: str, adapted: Callable[..., AdaptedModel]) -> None:
    made = adapted(dora=True, targets=("embed_tokens",))
    with pytest.raises(
        PrivacyError,
        match=rf"^\d trained layer\(s\) have no per-example gradient rule in {per_example}: \S+.*; set privacy\.per_"
        r"example_gradients=one_by_one \(exact for every architecture, slower\), or leave the layer out of peft\.",
    ):
        gradient_rule(PLAN, per_example, made.network, made.parameters, SecureStream.insecure(0), without_rule="refuse")
    assert not any(module._backward_hooks or "forward" in vars(module) for module in made.network.modules())


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="per_example='ghost' is none of native, opacus, one_by_one"):
        gradient_rule(PLAN, "ghost", nn.Linear(2, 2), {}, SecureStream.insecure(0))


def test_a_parameter_that_took_no_part_is_named() -> None:
    """Without this its gradient would be taken for zero, or one of the step before."""
    network = nn.ModuleDict({"used": nn.Linear(2, 1, bias=False), "idle": nn.Linear(2, 1, bias=False)})
    rule = OpacusGradients(PLAN, network, dict(network.named_parameters()), SecureStream.insecure(0))
    with pytest.raises(
        PrivacyError, match=r"idle\.weight left no gradient per example \(3 examples\); set privacy\.per_"
    ):
        rule.accumulate(network["used"](torch.ones(3, 2))[:, 0])
    rule.close()


def test_one_by_one_takes_one_by_one() -> None:
    network = nn.Linear(2, 1)
    rule = OneByOneGradients(PLAN, dict(network.named_parameters()), SecureStream.insecure(0))
    assert rule.max_micro_batch == 1
    with pytest.raises(ValueError, match=r"one unit at a time, not 2; "):
        rule.accumulate(network(torch.ones(2, 2))[:, 0])
