"""Square cores between frozen factors: where they start, what they compute, and what PEFT loads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conf.schema.model import LoRA, Model
from conf.schema.task import CausalLM
from finetuning.adapters import AdaptedModel, attach
from finetuning.cores import without_cores
from finetuning.export import export_adapter
from finetuning.models import load_base
from protocol.errors import ModelError

IDS = torch.tensor([[7, 8, 9, 10, 11]])


def adapted_model(path: Path, cores: int, rank: int = 6, targets: tuple[str, ...] | str = "auto") -> AdaptedModel:
    config = LoRA.model_validate({"rank": rank, "targets": targets})
    return attach(load_base(Model(path=str(path)), CausalLM(), "cpu"), config, CausalLM(), cores)


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(input_ids=IDS).logits.clone()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cores", [1, 3])
def test_the_export_is_what_was_trained(
    family: str, cores: int, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapted = adapted_model(tiny_model(family), cores)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
    initial = adapted.initial(3)
    adapted.load(initial)
    torch.testing.assert_close(logits(adapted.network), logits(base))
    generator = torch.Generator().manual_seed(0)
    trained = {
        name: torch.randn(tensor.shape, generator=generator) if "lora_core" in name else tensor
        for name, tensor in initial.items()
    }
    adapted.load(trained)
    ours = logits(adapted.network)
    assert not torch.allclose(ours, logits(base), atol=1e-2)
    export_adapter(tmp_path, adapted, trained, base="somewhere", card="card")
    theirs = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(theirs), ours, rtol=1e-4, atol=1e-4)
    assert not any("core" in name for name in without_cores(trained))


def test_bases_follow_from_the_seed_and_have_columns_of_length_one(tiny_model: Callable[..., Path]) -> None:
    adapted = adapted_model(tiny_model("llama"), 2)
    first, other, again = adapted.initial(3), adapted.initial(4), adapted.initial(3)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if "lora_A" in name or "lora_B" in name:
            assert not torch.equal(tensor, other[name])
    lengths = torch.cat([tensor.norm(dim=0) for name, tensor in first.items() if "lora_B" in name])
    assert float(lengths.mean()) == pytest.approx(1.0, abs=0.1)
    assert not any(tensor.any() for name, tensor in first.items() if name.endswith("lora_core"))
    assert all(torch.equal(tensor, torch.ones(2)) for name, tensor in first.items() if name.endswith("_scale"))


def test_a_site_of_lower_rank_has_the_first_heads(tiny_model: Callable[..., Path]) -> None:
    high = adapted_model(tiny_model("llama"), 3)
    whole = high.initial(3)
    part = attach(high.base, high.config.at_rank(2), CausalLM(), 1).initial(3, 6)
    for name, tensor in part.items():
        if "lora_A" in name:
            assert torch.equal(tensor, whole[name][:2])
        elif "lora_B" in name:
            assert torch.equal(tensor, whole[name][:, :2])
        elif name.endswith("lora_core"):
            assert tensor.shape == (1, 2, 2)


def test_what_takes_no_cores_is_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="is an embedding, which takes no square cores"):
        adapted_model(tiny_model("llama"), 1, targets=("embed_tokens",))
    with pytest.raises(ModelError, match=r"rank 6 is not divisible by strategy\.heads=4"):
        adapted_model(tiny_model("llama"), 4)
