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
from privacy.example_level import OneByOneGradients, OpacusGradients, layers_without_rule
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
    assert layers_without_rule(adapted(family).network) == []


def test_dora_is_named(adapted: Callable[..., AdaptedModel]) -> None:
    found = layers_without_rule(adapted(dora=True, targets=("q_proj",)).network)
    assert len(found) == 2
    assert all("lora_magnitude_vector" in name and name.endswith("(DoraLinearLayer)") for name in found)


def test_lora_on_an_embedding_is_named(adapted: Callable[..., AdaptedModel]) -> None:
    found = layers_without_rule(adapted(targets=("embed_tokens", "q_proj")).network)
    assert len(found) == 2
    assert all("lora_embedding_" in name and "(ParameterDict)" in name for name in found)


def test_a_frozen_layer_needs_no_rule(adapted: Callable[..., AdaptedModel]) -> None:
    made = adapted(targets=("embed_tokens", "q_proj"))
    made.train_only(frozenset(name for name in made.names if "q_proj" in name))
    assert layers_without_rule(made.network) == []


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False), nn.BatchNorm2d(3)])
def test_a_batch_norm_is_named_even_when_frozen(norm: nn.Module) -> None:
    """It mixes the examples of a batch, whoever trains."""
    network = nn.Sequential(nn.Linear(3, 3), norm.requires_grad_(False))
    assert layers_without_rule(network) == [f"1 ({type(norm).__name__})"]


def test_a_module_with_a_parameter_of_its_own_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

    class MyLinear(nn.Linear):
        """A subclass may compute anything."""

    assert layers_without_rule(nn.Sequential(Scale(), nn.Linear(2, 2), MyLinear(2, 2))) == ["0 (Scale)", "2 (MyLinear)"]


def test_the_refusal_says_what_to_do(adapted: Callable[..., AdaptedModel]) -> None:
    made = adapted(dora=True, targets=("q_proj",))
    with pytest.raises(
        PrivacyError,
        match=r"^2 trained layer\(s\) have no per-example gradient rule, first \S+lora_magnitude_vector\.default "
        r"\(DoraLinearLayer\); set privacy\.per_example_gradients=one_by_one \(exact for every architecture, slower\), "
        r"or leave the layer out of peft\.targets$",
    ):
        OpacusGradients(PLAN, made.network, made.parameters, SecureStream.insecure(0))
    assert not any(module._backward_hooks for module in made.network.modules()), "a refusal leaves no hook behind"


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
    with pytest.raises(ValueError, match=r"one example at a time, not losses of shape \(2,\)"):
        rule.accumulate(network(torch.ones(2, 2))[:, 0])
