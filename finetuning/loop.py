"""Local training: a fixed number of optimizer steps on gradients that somebody else makes (and may make private)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from conf.schema.federation import AdamW, LocalTraining, Optimizer
from finetuning.adapters import AdaptedModel
from finetuning.batches import Example
from finetuning.models import checkpointing
from finetuning.padding import BatchShape
from finetuning.tasks.base import TaskObjective
from finetuning.units import MicroBatches

__all__ = ["Gradients", "TrainingDiagnostics", "build_optimizer", "train_locally"]


class Gradients(Protocol):
    """The part of a gradient rule that the loop uses; `privacy.gradients.GradientRule` is the real thing."""

    max_micro_batch: int | None

    def draw(self, num_units: int) -> list[int]:
        """Return the positions of this step's units."""
        ...

    def accumulate(self, losses: torch.Tensor, owners: torch.Tensor | None = None) -> None:
        """Take one micro-batch's losses through the backward pass; `owners` gives each one's unit, -1 for padding."""
        ...

    def finish(self) -> None:
        """Leave the step's gradient in `.grad`."""
        ...


@dataclass(frozen=True)
class TrainingDiagnostics:
    """What happened in one round of training. All of it is private to the site."""

    steps: int
    examples: int
    mean_loss: float
    seconds: float


def train_locally(
    adapted: AdaptedModel,
    trained: Mapping[str, nn.Parameter],
    examples: Sequence[Example],
    objective: TaskObjective,
    gradients: Gradients,
    local: LocalTraining,
    *,
    seed: int,
    micro_batch_tokens: int,
    units: Sequence[Sequence[int]] | None = None,
    unit_weighting: Literal["mean", "sum"] = "mean",
    max_units: int | None = None,
    static_shapes: bool = False,
    longest: int | None = None,
    most_records: int = 1,
    alike: Callable[[BatchShape], bool] | None = None,
    gradient_checkpointing: bool = False,
    learning_rate_factor: float = 1.0,
    correct: Callable[[Mapping[str, nn.Parameter]], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TrainingDiagnostics:
    """Train the adapter in place for `local.steps` steps, and return what happened.

    Args:
        adapted: the network, holding the adapter to start from.
        trained: the parameters that may move.
        examples: the site's records.
        objective: the loss per example.
        gradients: draws the units and makes the gradient of each step.
        local: steps and optimizer.
        seed: of dropout, the only randomness here.
        micro_batch_tokens: padded tokens per forward pass; changes memory and speed, not the result.
        units: the positions of each unit's records; what is drawn, and protected, as one. None: each record alone.
        unit_weighting: whether a unit's loss is the mean or the sum over its records.
        max_units: bound on the units of a micro-batch, or None; changes memory and speed, not the result.
        static_shapes: pad every micro-batch to one shape with rows that add nothing; the result is the same.
        longest: public bound on a record's tokens, and
        most_records: on a unit's records; static shapes follow from them.
        alike: whether the rows of a batch of this shape are computed as each one alone is; None: it does not matter.
        gradient_checkpointing: recompute activations instead of keeping them; the result is the same.
        learning_rate_factor: multiplies the optimizer's learning rate.
        correct: adds the terms of a local objective to every step's finished (noised) gradient.
        clock: seconds, for the diagnostics.
    """
    began = clock()
    optimizer = build_optimizer(local.optimizer, list(trained.values()), learning_rate_factor)
    device = adapted.base.device
    batches = MicroBatches.of(
        examples,
        units,
        adapted.base.pad_token_id,
        max_tokens=micro_batch_tokens,
        max_units=min((most for most in (gradients.max_micro_batch, max_units) if most is not None), default=None),
        mean=unit_weighting == "mean",
        static_shapes=static_shapes,
        longest=longest,
        most_records=most_records,
        **({} if alike is None else {"alike": alike}),
    )
    loss_sum, seen = 0.0, 0
    adapted.network.train()
    devices = [device] if device.type == "cuda" else []
    with checkpointing(adapted.base.network, gradient_checkpointing), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for _ in range(local.steps):
            for part in batches.of_step(gradients.draw(len(batches.units))):
                part = part.to(device)
                losses = objective.losses(adapted.network, part.batch)
                gradients.accumulate(losses * part.weights, part.owners)
                loss_sum += float(losses.detach()[: part.records].sum())
                seen += part.records
            gradients.finish()
            if correct is not None:
                correct(trained)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    adapted.network.eval()
    return TrainingDiagnostics(local.steps, seen, loss_sum / max(seen, 1), clock() - began)


def build_optimizer(
    config: Optimizer, parameters: list[nn.Parameter], learning_rate_factor: float = 1.0
) -> torch.optim.Optimizer:
    """Return a fresh optimizer; its state lives for one round, so nothing carries over between sites."""
    rate = config.learning_rate * learning_rate_factor
    if isinstance(config, AdamW):
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(parameters, rate, betas=betas, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, rate, momentum=config.momentum, weight_decay=config.weight_decay)
