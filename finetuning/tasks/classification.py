"""Sequence classification."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from finetuning.batches import Batch
from finetuning.class_counts import ClassCounts
from finetuning.tasks.base import Quality

__all__ = ["ClassificationObjective"]


class ClassificationObjective:
    """Cross entropy of a record's class; evaluated as accuracy."""

    metric = "accuracy"
    higher_is_better = True

    def losses(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the cross entropy per example in nats, shape (examples,)."""
        return cross_entropy(_logits(network, batch), _labels(batch), reduction="none")

    def quality(self, network: nn.Module, batch: Batch) -> Quality:
        """Return cross entropy and hits summed over examples, and who was taken for whom."""
        logits, labels = _logits(network, batch), _labels(batch)
        hits = int((logits.argmax(dim=1) == labels).sum())
        loss = float(cross_entropy(logits, labels, reduction="sum"))
        return Quality(loss, hits, batch.size, ClassCounts.of(logits, labels))

    def headline(self, quality: Quality) -> float:
        """Return the accuracy in [0, 1]."""
        return quality.correct / quality.units if quality.units else float("nan")


def _logits(network: nn.Module, batch: Batch) -> torch.Tensor:
    if batch.summaries is not None:
        return network(summaries=batch.summaries).logits.float()
    return network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()


def _labels(batch: Batch) -> torch.Tensor:
    if batch.labels is None:
        raise ValueError("task=classification needs labelled examples")
    return batch.labels
