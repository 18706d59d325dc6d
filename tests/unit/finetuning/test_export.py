"""What is exported is what PEFT reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from conf.schema.model import LoRA, Model
from conf.schema.task import CausalLM, Classification, Task
from finetuning.adapters import attach
from finetuning.export import export_adapter
from finetuning.models import load_base

LABELS = Classification(labels=("left", "middle", "right"))
IDS = torch.tensor([[9, 31, 77, 102, 250, 6, 18, 44]])


def logits(network: torch.nn.Module) -> torch.Tensor:
    network.eval()
    with torch.inference_mode():
        return network(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.clone()


@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        ("llama", CausalLM(), {}),
        ("llama", CausalLM(), {"rslora": True, "targets": ("q_proj", "down_proj")}),
        ("llama", CausalLM(), {"dora": True}),
        ("llama", LABELS, {}),
        ("qwen3", CausalLM(), {}),
        ("phi3", CausalLM(), {}),
        ("gpt2", CausalLM(), {}),
        ("gpt2", CausalLM(), {"dora": True}),
        ("gpt2", LABELS, {}),
        ("bert", LABELS, {}),
        ("roberta", LABELS, {}),
    ],
)
def test_peft_reads_what_is_exported(
    family: str,
    task: Task,
    options: dict[str, object],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = load_base(Model(path=str(tiny_model(family))), task, "cpu")
    adapted = attach(base, LoRA.model_validate({"rank": 4, **options}), task)
    generator = torch.Generator().manual_seed(1)
    initial = adapted.initial(0)
    tensors = {name: each + 0.1 * torch.randn(each.shape, generator=generator) for name, each in initial.items()}
    adapted.load(tensors)
    ours = logits(adapted.network)
    export_adapter(tmp_path / "adapter", adapted, tensors, base=str(tiny_model(family)), card="# a card\n")
    assert (tmp_path / "adapter" / "README.md").read_text() == "# a card\n"

    auto, more = AutoModelForCausalLM, {}
    if task.kind == "classification":
        auto, more = AutoModelForSequenceClassification, {"num_labels": len(task.labels)}
    plain = auto.from_pretrained(tiny_model(family), **more)
    plain.config.pad_token_id = 0
    assert not torch.allclose(logits(plain), ours, atol=1e-3)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), ours, rtol=1e-5, atol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == str(tiny_model(family))
