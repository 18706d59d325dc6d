"""What is folded beside the base: in the forward pass, in gradients, at other ranks, and in PEFT's own format."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conf.schema.model import LoRA, Model
from conf.schema.task import CausalLM
from finetuning.adapters import AdaptedModel, attach
from finetuning.export import export_adapter
from finetuning.models import load_base
from protocol.errors import ModelError
from protocol.offsets import offset_names

IDS = torch.tensor([[7, 8, 9, 10, 11]])
CASES = [("llama", ("q_proj", "down_proj")), ("llama", ("embed_tokens", "v_proj")), ("gpt2", ("c_attn",))]


def adapted_model(path: Path, targets: tuple[str, ...], rank: int = 3, **lora: object) -> AdaptedModel:
    config = LoRA.model_validate({"rank": rank, "targets": targets, **lora})
    return attach(load_base(Model(path=str(path)), CausalLM(), "cpu"), config, CausalLM())


def random_adapter(adapted: AdaptedModel, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.3 * torch.randn(p.shape, generator=generator) for n, p in adapted.parameters.items()}


def with_offsets(adapted: AdaptedModel, adapter: dict[str, torch.Tensor], inner: int = 4) -> dict[str, torch.Tensor]:
    generator, both = torch.Generator().manual_seed(9), dict(adapter)
    for name in adapter:
        module, found, _ = name.partition(".lora_B")
        a, b = f"{module}.lora_A.weight", name
        if not found:
            module, found, _ = name.partition(".lora_embedding_B")
            a, b = f"{module}.lora_embedding_A", name
        if found:
            rows, columns = adapter[b].shape[0], adapter[a].shape[1]
            if "embedding" in a:
                rows, columns = columns, rows
            left, right = offset_names(module)
            both[left] = 0.3 * torch.randn(rows, inner, generator=generator)
            both[right] = 0.3 * torch.randn(inner, columns, generator=generator)
    return both


def logits(adapted: AdaptedModel, adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    adapted.load(adapter)
    adapted.network.eval()
    with torch.no_grad():
        return adapted.network(input_ids=IDS).logits.clone()


@pytest.mark.parametrize(("family", "targets"), CASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_export_with_offsets_is_what_was_trained(
    family: str, targets: tuple[str, ...], rslora: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapted = adapted_model(tiny_model(family), targets, rslora=rslora)
    adapter = with_offsets(adapted, random_adapter(adapted))
    ours, plain = logits(adapted, adapter), logits(adapted, random_adapter(adapted))
    assert not torch.allclose(ours, plain, atol=1e-2)
    export_adapter(tmp_path, adapted, adapter, base="somewhere", card="card")
    base = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    assert theirs.peft_config["default"].r == 7
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, ours, rtol=1e-4, atol=1e-4)


def test_offsets_of_different_sizes_are_filled_up(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    adapted = adapted_model(tiny_model("llama"), ("q_proj", "v_proj"))
    adapter = with_offsets(adapted, random_adapter(adapted))
    first = sorted(name for name in adapter if name.endswith("lora_offset_left"))[0]
    adapter[first] = adapter[first][:, :2]
    adapter[first.replace("left", "right")] = adapter[first.replace("left", "right")][:2]
    gone = sorted(name for name in adapter if name.endswith("lora_offset_left"))[1]
    del adapter[gone], adapter[gone.replace("left", "right")]
    ours = logits(adapted, adapter)
    export_adapter(tmp_path, adapted, adapter, base="somewhere", card="card")
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)


def test_an_offset_is_gone_with_the_next_adapter(tiny_model: Callable[..., Path]) -> None:
    adapted = adapted_model(tiny_model("llama"), ("q_proj",))
    plain = random_adapter(adapted)
    before = logits(adapted, plain)
    logits(adapted, with_offsets(adapted, plain))
    torch.testing.assert_close(logits(adapted, plain), before)
    logits(adapted, with_offsets(adapted, plain))
    adapted.initial(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted.network.eval()(input_ids=IDS).logits, base(input_ids=IDS).logits)


def test_a_gradient_flows_past_an_offset_and_not_into_it(tiny_model: Callable[..., Path]) -> None:
    adapted = adapted_model(tiny_model("llama"), ("q_proj", "down_proj"))
    adapter = with_offsets(adapted, random_adapter(adapted))
    adapted.load(adapter)
    trained = adapted.train_only(adapted.names)
    adapted.network(input_ids=IDS, labels=IDS).loss.backward()
    assert all(bool(parameter.grad.any()) for parameter in trained.values() if parameter.grad is not None)
    assert adapted.extract().keys() == adapted.names


@pytest.mark.parametrize("lora", [{}, {"dora": True}])
def test_an_offset_that_does_not_fit_is_refused(lora: dict[str, object], tiny_model: Callable[..., Path]) -> None:
    adapted = adapted_model(tiny_model("llama"), ("q_proj",), **lora)
    adapter = random_adapter(adapted)
    module = next(iter(adapter)).partition(".lora_")[0]
    left, right = offset_names(module)
    with pytest.raises(ModelError, match=r"no plain LoRA layer" if lora else r"the offset of .* has shapes"):
        adapted.load({**adapter, left: torch.zeros(5, 2), right: torch.zeros(2, 32)})
    with pytest.raises(ModelError, match="which is no plain LoRA layer of this model"):
        adapted.load({**adapter, "nowhere.lora_offset_left": torch.zeros(5, 2)})


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_an_adapter_of_lower_rank_starts_as_a_cut(
    family: str, targets: tuple[str, ...], tiny_model: Callable[..., Path]
) -> None:
    high, config = adapted_model(tiny_model(family), targets, rank=4), LoRA(rank=4, targets=targets)
    whole = high.initial(5)
    low = attach(high.base, config.at_rank(2), CausalLM())
    part = low.initial(5, 4)
    assert part.keys() == whole.keys()
    for name, tensor in part.items():
        rows, columns = tensor.shape
        assert 2 in (rows, columns)
        assert torch.equal(tensor, whole[name][:rows, :columns])


def test_adapters_of_different_ranks_take_turns_in_one_base(tiny_model: Callable[..., Path]) -> None:
    high = adapted_model(tiny_model("llama"), ("q_proj", "down_proj"), rank=4)
    adapter = random_adapter(high)
    expected = logits(high, adapter)
    low = attach(high.base, high.config.at_rank(2), CausalLM())
    cut = {name: tensor[:2] if "lora_A" in name else tensor[:, :2] for name, tensor in adapter.items()}
    filled = {
        name: torch.cat([tensor, torch.zeros_like(tensor)], dim=0 if "lora_A" in name else 1)
        for name, tensor in cut.items()
    }
    small = logits(low, cut)
    torch.testing.assert_close(logits(high, filled), small, rtol=1e-5, atol=1e-5)
    assert attach(high.base, low.config, CausalLM()) is low
    torch.testing.assert_close(logits(low, cut), small)
    torch.testing.assert_close(logits(high, adapter), expected)
    assert low.config.alpha / low.config.rank == high.config.alpha / high.config.rank
