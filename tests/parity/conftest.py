"""Networks with a random adapter, privacy plans, and an independent computation of the clipped sum."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from client.row_check import RowCheck, losses_and_gradients
from conf.schema.model import LoRA, Model
from conf.schema.task import CausalLM, Classification, Task
from finetuning.adapters import AdaptedModel, attach
from finetuning.batches import Example
from finetuning.models import load_base
from finetuning.padding import BatchShape
from finetuning.summaries import reads_summaries, summaries_of, summarized
from finetuning.tasks.build import build_objective
from finetuning.units import MicroBatches
from privacy.example_level import NativeGradients, OpacusGradients
from privacy.gradients import GradientRule, gradient_rule
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream
from privacy.sampling import PoissonSampling
from strategies.lora.fedit import fedit
from strategies.lora.ffa_lora import ffa_lora

CLASSES = ("left", "middle", "right")
TASKS: dict[str, Task] = {
    "causal_lm": CausalLM(),
    "classification": Classification(labels=CLASSES),
    "pooled": Classification(labels=CLASSES, pooling="mean"),
}
STRATEGIES = {"fedit": fedit(), "ffa_lora": ffa_lora()}
ENCODERS = ("bert", "roberta")


@dataclass(frozen=True)
class Bench:
    """A network with a random adapter in it, the parameters that train, and ways to sum their gradients."""

    adapted: AdaptedModel
    trained: dict[str, nn.Parameter]
    task: Task

    def rule(self, clip_norm: float = 1.0, noise: float = 0.0, per_example: str = "native") -> GradientRule:
        """Return the real gradient rule, without noise unless asked for."""
        plan = plan_of(clip_norm, noise)
        return gradient_rule(plan, per_example, self.adapted.network, self.trained, SecureStream.insecure(0, "bench"))

    def batched(
        self,
        examples: Sequence[Example],
        clip_norm: float = 1.0,
        per_example: str = "native",
        micro_batch_tokens: int = 8192,
        seed: int = 0,
        **grouping: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the sum that the rule makes of `examples`: grouped, padded, checked as a site does it; undivided."""
        rule = self.rule(clip_norm, per_example=per_example)
        objective = build_objective(self.task)
        self.adapted.network.train()
        torch.manual_seed(seed)
        try:
            made = MicroBatches.of(
                self.as_read(examples, rule, micro_batch_tokens),
                grouping.pop("units", None),
                self.adapted.base.pad_token_id,
                max_tokens=micro_batch_tokens,
                max_units=rule.max_micro_batch,
                **({"alike": self.row_check(rule, grouping)} | grouping),
            )
            for part in made.of_step(range(len(made.units))):
                rule.accumulate(objective.losses(self.adapted.network, part.batch) * part.weights, part.owners)
            rule.finish()
            return {name: each.grad.double() for name, each in self.trained.items() if each.grad is not None}
        finally:
            rule.close()
            for parameter in self.trained.values():
                parameter.grad = None

    def row_check(self, rule: GradientRule, grouping: Mapping[str, Any]) -> Callable[[BatchShape], bool]:
        """Return the real check of which shapes are computed row by row alike."""
        if not isinstance(rule, NativeGradients | OpacusGradients):
            return lambda shape: True
        classes = len(CLASSES) if isinstance(self.task, Classification) else None
        static, longest = grouping.get("static_shapes", False), grouping.get("longest")
        key = (type(rule), frozenset(self.trained), static)
        computed = losses_and_gradients(self.adapted, build_objective(self.task), rule.per_unit)
        reads = reads_summaries(self.adapted)
        return RowCheck(self.adapted, computed, classes, static, longest, key, summaries=reads)

    def as_read(self, examples: Sequence[Example], rule: GradientRule, micro_batch_tokens: int) -> Sequence[Example]:
        """Return the examples as a site's training reads them: summarized where only a head is trained."""
        if not reads_summaries(self.adapted):
            return examples
        alike = RowCheck(
            self.adapted, lambda batch, _: [summaries_of(self.adapted, batch)], len(CLASSES), False, None, (type(rule),)
        )
        is_batched = isinstance(rule, NativeGradients | OpacusGradients)
        return summarized(
            self.adapted,
            examples,
            micro_batch_tokens=micro_batch_tokens,
            max_rows=rule.max_micro_batch,
            alike=alike if is_batched else None,
        )

    def gradient(self, example: Example) -> dict[str, torch.Tensor]:
        """Return one example's gradient in float64 by plain autograd: no padding, no hooks, no code of ours."""
        ids = torch.tensor(example.input_ids, dtype=torch.int64)[None]
        self.adapted.network.train()
        log_odds = self.adapted.network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
        if example.label is None:
            chosen = [position for position in range(1, len(example)) if example.trained[position]]
            terms = [-log_odds[0, position - 1].log_softmax(0)[ids[0, position]] for position in chosen]
            loss = torch.stack(terms).mean() if terms else log_odds.sum() * 0
        else:
            loss = -log_odds[0].log_softmax(0)[example.label]
        parts = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
        return {
            name: torch.zeros_like(parameter, dtype=torch.float64) if part is None else part.double()
            for (name, parameter), part in zip(self.trained.items(), parts, strict=True)
        }

    def one_at_a_time(self, examples: Sequence[Example], clip_norm: float = 1.0) -> dict[str, torch.Tensor]:
        """Return the clipped sum from the definition, in float64."""
        total = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in self.trained.items()}
        for example in examples:
            own = self.gradient(example)
            factor = min(1.0, clip_norm / max(norm_of(own), 1e-300))
            for name in total:
                total[name] += factor * own[name]
        return total


def plan_of(clip_norm: float, noise: float, normalizer: float = 1.0) -> PrivacyPlan:
    """Return an example-level plan with round numbers; the sum is divided by `normalizer`."""
    return PrivacyPlan(
        unit="one record",
        relation="add or remove one record of a site",
        sampling=PoissonSampling(0.5, 100),
        clip_norm=clip_norm,
        noise_multiplier=noise,
        normalizer=normalizer,
        steps_per_round=1,
        rounds=1,
        delta=1e-5,
    )


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    """Return the L2 norm over all tensors together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def relative_error(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Return ‖left - right‖ / ‖right‖ over all tensors together."""
    assert left.keys() == right.keys()
    return norm_of({name: left[name] - right[name] for name in right}) / norm_of(right)


@pytest.fixture(scope="session")
def error_of() -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], float]:
    """The relative error of one set of tensors against another."""
    return relative_error


@pytest.fixture(scope="session")
def total_norm() -> Callable[[dict[str, torch.Tensor]], float]:
    """The L2 norm over all tensors."""
    return norm_of


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., PrivacyPlan]:
    """Plans with round numbers."""
    return plan_of


@pytest.fixture
def bench(tiny_model: Callable[..., Path]) -> Callable[..., Bench]:
    """Return `make(family, strategy="fedit", task=None, dtype="fp32", **lora)`; no factor of the adapter is zero."""

    def make(
        family: str, strategy: str = "fedit", task: str | None = None, dtype: str = "fp32", **lora: object
    ) -> Bench:
        wanted = TASKS[task or ("classification" if family in ENCODERS else "causal_lm")]
        base = load_base(Model(path=str(tiny_model(family)), dtype=dtype), wanted, "cpu")  # type: ignore[arg-type]
        adapted = attach(base, LoRA.model_validate({"rank": 4, "alpha": 8.0, **lora}), wanted)
        initial = adapted.initial(3)
        generator = torch.Generator().manual_seed(11)
        adapted.load(
            {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in initial.items()}
        )
        return Bench(adapted, adapted.train_only(STRATEGIES[strategy].trained(adapted.names, 1)), wanted)

    return make
