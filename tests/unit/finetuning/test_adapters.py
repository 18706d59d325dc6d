"""Attaching, loading, copying out, detaching and exporting adapters, on every family of models."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conf.schema.federation import SGD, LocalTraining
from conf.schema.model import LoRA, Model
from conf.schema.privacy import NoPrivacy
from conf.schema.task import CausalLM, Classification, Task
from finetuning import models
from finetuning.adapters import AdaptedModel, attach
from finetuning.batches import Example, collate
from finetuning.loop import train_locally
from finetuning.models import FrozenBase, load_base
from finetuning.tasks.build import build_objective
from privacy.no_privacy import PlainGradients
from privacy.plan import build_plan
from privacy.randomness import SecureStream
from protocol.errors import ModelError
from strategies.lora.fedit import fedit
from strategies.lora.ffa_lora import ffa_lora

LLAMA_LIKE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
BERT_LIKE = {"query", "key", "value", "dense"}
TARGETS = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "gemma": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3": LLAMA_LIKE,
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "bert": BERT_LIKE,
    "roberta": BERT_LIKE,
}
# Layers per block, times two blocks.
LAYERS = {"gpt2": 8, "phi": 12, "phi3": 8, "bert": 12, "roberta": 12}
HEADS = {
    # A checkpoint of a masked language model has no pooler: it is as new as the head, and no part of the base.
    "bert": {f"{module}.{kind}" for module in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")},
    "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
    "gpt2": {"score.weight"},
    "llama": {"score.weight"},
}
ENCODERS = ("bert", "roberta")
LABELS = Classification(labels=("left", "middle", "right"))
STRATEGIES = {"fedit": fedit(), "ffa_lora": ffa_lora()}
IDS = torch.tensor([[9, 31, 77, 102, 250, 6, 18, 44]])


def task_of(family: str) -> Task:
    return LABELS if family in ENCODERS else CausalLM()


def logits(network: torch.nn.Module) -> torch.Tensor:
    network.eval()
    with torch.inference_mode():
        return network(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.clone()


def noisy(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def base(tiny_model: Callable[..., Path]) -> Callable[..., FrozenBase]:
    """Return `make(family, task=None, dtype="fp32")`: a base that no other test has attached anything to."""

    def make(family: str, task: Task | None = None, dtype: str = "fp32") -> FrozenBase:
        models._load.cache_clear()  # type: ignore[attr-defined]
        return load_base(Model(path=str(tiny_model(family)), dtype=dtype), task or task_of(family), "cpu")  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("strategy", ["fedit", "ffa_lora"])
@pytest.mark.parametrize("family", TARGETS)
def test_auto_targets_every_linear_layer_of_the_blocks(
    family: str, strategy: str, base: Callable[..., FrozenBase]
) -> None:
    frozen = base(family)
    adapted = attach(frozen, LoRA(rank=4), task_of(family))
    layers = {name.removesuffix(".weight").rsplit(".", 1)[0] for name in adapted.names if ".lora_" in name}
    assert {layer.rsplit(".", 1)[-1] for layer in layers} == TARGETS[family]
    assert len(layers) == LAYERS.get(family, 14)
    factors = {f"{layer}.{factor}.weight" for layer in layers for factor in ("lora_A", "lora_B")}
    head = {f"base_model.model.{name}" for name in HEADS[family]} if family in ENCODERS else set()
    assert adapted.names == factors | head

    trained = adapted.train_only(STRATEGIES[strategy].trained(adapted.names, 1))
    wanted = adapted.names if strategy == "fedit" else {name for name in adapted.names if ".lora_A." not in name}
    assert trained.keys() == wanted
    moving = {id(parameter) for parameter in adapted.network.parameters() if parameter.requires_grad}
    assert moving == {id(parameter) for parameter in trained.values()}


@pytest.mark.parametrize("family", TARGETS)
def test_the_initial_adapter_is_the_base_function(family: str, base: Callable[..., FrozenBase]) -> None:
    frozen = base(family)
    before = logits(frozen.network)
    adapted = attach(frozen, LoRA(rank=4), task_of(family))
    first = adapted.initial(5)
    assert all(not tensor.any() for name, tensor in first.items() if ".lora_B" in name)
    assert all(tensor.any() for name, tensor in first.items() if ".lora_A" in name)
    torch.testing.assert_close(logits(adapted.network), before, rtol=0, atol=1e-6)

    adapted.load(noisy(first, 1))
    assert not torch.allclose(logits(adapted.network), before, atol=1e-3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert same(adapted.initial(5), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was moved"
    torch.testing.assert_close(logits(adapted.network), before, rtol=0, atol=1e-6)
    assert not same(adapted.initial(6), first)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_load_and_extract_are_inverse_and_copy(family: str, dora: bool, base: Callable[..., FrozenBase]) -> None:
    adapted = attach(base(family), LoRA(rank=4, dora=dora), task_of(family))
    given = noisy(adapted.initial(0), 3)
    adapted.load(given)
    taken = adapted.extract()
    assert same(taken, given)
    kept = {name: tensor.clone() for name, tensor in taken.items()}
    adapted.load(noisy(adapted.initial(0), 4))
    assert same(taken, kept), "the next site's adapter shows through the copy"
    assert all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in taken.values())
    assert same(given, kept), "loading keeps the caller's tensors apart"


def test_load_refuses_another_layout(base: Callable[..., FrozenBase]) -> None:
    adapted = attach(base("llama"), LoRA(rank=4), CausalLM())
    good = adapted.initial(0)
    name = min(good)
    with pytest.raises(ModelError, match=f"1 tensor name\\(s\\) differ, first {name}"):
        adapted.load({key: value for key, value in good.items() if key != name})
    with pytest.raises(ModelError, match=r"has shape \(1, 1\), the model needs"):
        adapted.load(good | {name: torch.zeros(1, 1)})


def train(adapted: AdaptedModel, start: dict[str, torch.Tensor], examples: list[Example], steps: int = 2) -> None:
    adapted.load(start)
    trained = adapted.train_only(adapted.names)
    local = LocalTraining(steps=steps, expected_batch_size=4, optimizer=SGD(learning_rate=0.5, momentum=0.9))
    plan = build_plan(NoPrivacy(), local, rounds=1, published_units=4, num_units=4)
    task = CausalLM() if examples[0].label is None else LABELS
    rule = PlainGradients(plan, trained, SecureStream.insecure(0))
    train_locally(adapted, trained, examples, build_objective(task), rule, local, seed=1, micro_batch_tokens=256)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"dora": True}, {"rslora": True}])
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_nothing_leaks_from_one_site_to_the_next(
    family: str,
    options: dict[str, object],
    base: Callable[..., FrozenBase],
    make_examples: Callable[..., list[Example]],
) -> None:
    """Site B gets the same adapter whether or not site A trained in this process before it."""
    config = LoRA.model_validate({"rank": 4, **options})
    classes = 3 if family in ENCODERS else None
    first, second = (make_examples([8, 12, 5, 9], seed=seed, classes=classes) for seed in (1, 2))

    alone = attach(base(family), config, task_of(family))
    start = alone.initial(0)
    train(alone, start, second)
    expected = alone.extract()
    assert not same(expected, start)

    shared = attach(base(family), config, task_of(family))
    assert shared.network is not alone.network
    assert same(shared.initial(0), start)
    train(shared, start, first)
    after_first = shared.extract()
    assert same(shared.initial(0), start)
    train(shared, start, second)
    assert same(shared.extract(), expected)
    assert not same(after_first, expected)


def test_rslora_scales_by_the_root_of_the_rank(base: Callable[..., FrozenBase]) -> None:
    """α/√r at alpha 2 is α/r at alpha 4 when the rank is 4: the same adapter gives the same function."""
    scaled = attach(base("llama"), LoRA(rank=4, alpha=2, rslora=True), CausalLM())
    given = noisy(scaled.initial(0), 2)
    scaled.load(given)
    with_root = logits(scaled.network)
    plain = attach(base("llama"), LoRA(rank=4, alpha=4), CausalLM())
    plain.load(given)
    torch.testing.assert_close(logits(plain.network), with_root, rtol=1e-5, atol=1e-5)
    plain.load({name: tensor * 1.1 for name, tensor in given.items()})
    assert not torch.allclose(logits(plain.network), with_root, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_dora_starts_as_the_base_again_after_training(family: str, base: Callable[..., FrozenBase]) -> None:
    """The magnitudes are part of the initial adapter: a trained one must not survive `initial`."""
    frozen = base(family)
    before = logits(frozen.network)
    adapted = attach(frozen, LoRA(rank=4, dora=True), task_of(family))
    first = adapted.initial(0)
    assert sum("lora_magnitude_vector" in name for name in first) == LAYERS.get(family, 14)
    torch.testing.assert_close(logits(adapted.network), before, rtol=1e-4, atol=1e-5)
    adapted.load(noisy(first, 1))
    assert same(adapted.initial(0), first)
    torch.testing.assert_close(logits(adapted.network), before, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only(base: Callable[..., FrozenBase]) -> None:
    adapted = attach(base("llama"), LoRA(rank=4, dropout=0.5), CausalLM())
    adapted.load(noisy(adapted.initial(0), 1))
    assert torch.equal(logits(adapted.network), logits(adapted.network))
    adapted.network.train()
    with torch.inference_mode():
        first, second = (adapted.network(input_ids=IDS).logits for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (("q_proj", "v_proj"), 4),
        (("mlp.down_proj",), 2),
        (("model.layers.1.self_attn.o_proj",), 1),
        (("lm_head",), 1),
    ],
)
def test_explicit_targets(targets: tuple[str, ...], layers: int, base: Callable[..., FrozenBase]) -> None:
    adapted = attach(base("llama"), LoRA(rank=4, targets=targets), CausalLM())
    assert len(adapted.names) == 2 * layers
    endings = tuple(f"{target}.lora_{factor}.weight" for target in targets for factor in "AB")
    assert all(name.endswith(endings) for name in adapted.names)


@pytest.mark.parametrize("strategy", ["fedit", "ffa_lora"])
def test_an_embedding_can_be_a_target_and_learns_under_every_strategy(
    strategy: str, base: Callable[..., FrozenBase], make_examples: Callable[..., list[Example]]
) -> None:
    """PEFT zeroes the *first* factor of an embedding: frozen like other first factors it would never learn."""
    adapted = attach(base("llama"), LoRA(rank=4, targets=("embed_tokens",)), CausalLM())
    start = adapted.initial(0)
    names = STRATEGIES[strategy].trained(adapted.names, 1)
    trained = adapted.train_only(names)
    adapted.network.train()
    examples = make_examples([9, 14])
    for _ in range(2):
        build_objective(CausalLM()).losses(adapted.network, collate(examples, 0)).sum().backward()
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    adapted_logits = logits(adapted.network)
    adapted.load(start)
    assert not torch.allclose(adapted_logits, logits(adapted.network), atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_porj",), r"no module of this model is named 'q_porj'; did you mean q_proj\? Linear layers: down_proj, "),
        (
            ("zzzzzz",),
            r"named 'zzzzzz'\. Linear layers: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj$",
        ),
        (
            ("input_layernorm",),
            r"peft.targets: \S*input_layernorm is a LlamaRMSNorm, neither a linear layer nor an embedding",
        ),
        (("self_attn",), r"self_attn is a LlamaAttention"),
    ],
)
def test_unusable_targets_are_named(targets: tuple[str, ...], message: str, base: Callable[..., FrozenBase]) -> None:
    with pytest.raises(ModelError, match=message):
        attach(base("llama"), LoRA(rank=4, targets=targets), CausalLM())


def test_a_rank_above_a_layer_is_refused_with_its_size(base: Callable[..., FrozenBase]) -> None:
    with pytest.raises(
        ModelError,
        match=r"peft.rank=33 is above the size of model\.layers\.0\.mlp\.down_proj \(32 x 48\); use at most 32",
    ):
        attach(base("llama"), LoRA(rank=33), CausalLM())


@pytest.mark.parametrize("family", HEADS)
def test_the_head_is_part_of_a_classification_adapter(family: str, base: Callable[..., FrozenBase]) -> None:
    adapted = attach(base(family, LABELS), LoRA(rank=4), LABELS)
    names = {name.removeprefix("base_model.model.") for name in adapted.names if ".lora_" not in name}
    assert names == HEADS[family]
    first = adapted.initial(0)
    adapted.load(noisy(first, 1))
    moved = logits(adapted.network)
    assert moved.shape == (1, 3)
    head = next(name for name in first if name.endswith(next(iter(HEADS[family]))))
    adapted.load(noisy(first, 1) | {head: first[head] + 1})
    assert not torch.allclose(logits(adapted.network), moved)
    assert same(adapted.initial(0), first), "a trained head must not survive `initial`"


def test_a_head_on_a_16_bit_base_is_float32(base: Callable[..., FrozenBase]) -> None:
    adapted = attach(base("bert", LABELS, "bf16"), LoRA(rank=4), LABELS)
    assert {parameter.dtype for parameter in adapted.parameters.values()} == {torch.float32}
    assert logits(adapted.network).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_another_configuration_starts_from_a_clean_base(
    family: str, dtype: str, base: Callable[..., FrozenBase]
) -> None:
    task = LABELS if family in HEADS else CausalLM()
    frozen = base(family, task, dtype)
    before = logits(frozen.network)
    first = attach(frozen, LoRA(rank=4), task)
    start = first.initial(0)
    first.load(noisy(start, 1))
    second = attach(frozen, LoRA(rank=2, dora=True), task)
    assert second is not first
    assert second.base is frozen
    fresh = second.initial(0)
    tolerance = 1e-4 if dtype == "fp32" else 0.05
    torch.testing.assert_close(logits(second.network).float(), before.float(), rtol=0, atol=tolerance)
    for name in HEADS.get(family, ()):
        assert torch.equal(fresh[f"base_model.model.{name}"], start[f"base_model.model.{name}"])
    third = attach(frozen, LoRA(rank=4), task)
    assert third is not first
    assert same(third.initial(0), start)


def test_the_same_configuration_returns_the_same_object(base: Callable[..., FrozenBase]) -> None:
    frozen = base("llama")
    first = attach(frozen, LoRA(rank=4), CausalLM())
    assert attach(frozen, LoRA(rank=4), CausalLM()) is first


def test_a_refused_configuration_leaves_no_half_detached_adapter(base: Callable[..., FrozenBase]) -> None:
    frozen = base("llama")
    good = LoRA(rank=4)
    attach(frozen, good, CausalLM())
    with pytest.raises(ModelError):
        attach(frozen, LoRA(rank=4, targets=("nonsense",)), CausalLM())
    again = attach(frozen, good, CausalLM())
    before = logits(again.network)
    again.load(noisy(again.initial(0), 1))
    assert not torch.allclose(logits(again.network), before, atol=1e-3), "the adapter is not in the network"


def test_a_base_that_is_no_longer_used_is_freed(base: Callable[..., FrozenBase]) -> None:
    network = weakref.ref(attach(base("llama"), LoRA(rank=4), CausalLM()).base.network)
    models._load.cache_clear()  # type: ignore[attr-defined]
    gc.collect()
    assert network() is None
