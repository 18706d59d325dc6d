"""What every task offers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import nn

from finetuning.batches import Batch
from finetuning.class_counts import ClassCounts

__all__ = ["Quality", "TaskObjective"]


@dataclass(frozen=True)
class Quality:
    """Sums over evaluated units (tokens, or examples), so that parts add up without an average of averages."""

    loss_sum: float = 0.0
    correct: int = 0
    units: int = 0
    classes: ClassCounts | None = None
    """Of a classifier."""

    def __add__(self, other: Quality) -> Quality:
        counted = [each.classes for each in (self, other) if each.classes is not None]
        return Quality(
            self.loss_sum + other.loss_sum,
            self.correct + other.correct,
            self.units + other.units,
            reduce(ClassCounts.__add__, counted) if counted else None,
        )

    @property
    def loss(self) -> float:
        """Mean loss per unit, in nats."""
        return self.loss_sum / self.units if self.units else float("nan")


class TaskObjective(Protocol):
    """A loss per example for training, and sums for evaluation."""

    metric: str
    """Name of the headline metric."""

    higher_is_better: bool

    def losses(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """Return one loss per example, shape (examples,), each a function of its own example alone."""
        ...

    def quality(self, network: nn.Module, batch: Batch) -> Quality:
        """Return the evaluation sums of a batch."""
        ...

    def headline(self, quality: Quality) -> float:
        """Return the headline metric."""
        ...
