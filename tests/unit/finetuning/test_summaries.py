"""Summaries of records by a frozen encoder: the network's own, in order, and each a record's own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.schema.model import LoRA, Model
from conf.schema.task import Classification
from finetuning.adapters import AdaptedModel, attach
from finetuning.batches import Example, collate
from finetuning.evaluation import evaluate
from finetuning.models import load_base
from finetuning.summaries import reads_summaries, summarized
from finetuning.tasks.build import build_objective

Make = Callable[..., Path]
MEAN = Classification(labels=("left", "middle", "right"), pooling="mean")
STOCK = MEAN.model_copy(update={"pooling": "model"})
LENGTHS = (9, 3, 30, 17, 4, 16, 30, 5)


def attached(folder: Path, task: Classification, targets: str = "none") -> AdaptedModel:
    adapted = attach(load_base(Model(path=str(folder)), task, "cpu"), LoRA.model_validate({"targets": targets}), task)
    generator = torch.Generator().manual_seed(2)
    adapted.load({name: torch.randn(each.shape, generator=generator) for name, each in adapted.parameters.items()})
    return adapted


@pytest.fixture
def examples() -> list[Example]:
    generator = np.random.default_rng(4)
    return [
        Example(generator.integers(6, 200, size).astype(np.int32), np.ones(size, dtype=np.bool_), size % 3)
        for size in LENGTHS
    ]


def test_only_a_head_on_a_summary_lets_the_tokens_go(tiny_model: Make) -> None:
    assert reads_summaries(attached(tiny_model("bert"), MEAN))
    assert not reads_summaries(attached(tiny_model("bert"), MEAN, targets="auto"))
    assert not reads_summaries(attached(tiny_model("bert"), STOCK))


@pytest.mark.parametrize(("budget", "static"), [(4096, False), (40, False), (200, True)])
def test_the_network_gives_the_same_for_a_text_and_its_summary(
    budget: int, static: bool, tiny_model: Make, examples: list[Example]
) -> None:
    adapted = attached(tiny_model("bert"), MEAN)
    kept = summarized(adapted, examples, micro_batch_tokens=budget, longest=30, static_shapes=static)
    assert [each.label for each in kept] == [each.label for each in examples]
    assert all(len(each) == 1 for each in kept)
    objective = build_objective(MEAN)
    with torch.inference_mode():
        ours = objective.losses(adapted.network, collate(kept, 0))
        theirs = [objective.losses(adapted.network, collate([each], 0)) for each in examples]
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-5, atol=1e-5)


def test_evaluation_of_summaries_is_that_of_the_texts(tiny_model: Make, examples: list[Example]) -> None:
    adapted, objective = attached(tiny_model("bert"), MEAN), build_objective(MEAN)
    kept = summarized(adapted, examples, micro_batch_tokens=100)
    one, other = (evaluate(adapted, each, objective, micro_batch_tokens=100) for each in (kept, examples))
    assert (one.correct, one.units) == (other.correct, other.units)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_dropout_leaves_summaries_alone(tiny_model: Make, examples: list[Example]) -> None:
    """A summary is computed once, so a mask in it would be the same in every step."""
    adapted = attached(tiny_model("bert"), MEAN)
    adapted.network.train()
    one, other = (summarized(adapted, examples, micro_batch_tokens=100) for _ in range(2))
    assert all(np.array_equal(a.summary, b.summary) for a, b in zip(one, other, strict=True))  # type: ignore[arg-type]
