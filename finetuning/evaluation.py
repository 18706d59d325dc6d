"""How good an adapter is on held-out records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch

from finetuning.adapters import AdaptedModel
from finetuning.batches import Example, collate, micro_batches
from finetuning.tasks.base import Quality, TaskObjective

__all__ = ["evaluate", "evaluate_groups"]


def evaluate(
    adapted: AdaptedModel, examples: Sequence[Example], objective: TaskObjective, *, micro_batch_tokens: int
) -> Quality:
    """Return the quality of the adapter that the network now holds."""
    adapted.network.eval()
    total = Quality()
    with torch.inference_mode():
        for group in micro_batches([len(example) for example in examples], max_tokens=micro_batch_tokens):
            batch = collate([examples[position] for position in group], adapted.base.pad_token_id)
            total += objective.quality(adapted.network, batch.to(adapted.base.device))
    return total


def evaluate_groups(
    adapted: AdaptedModel,
    groups: Mapping[str, Sequence[Example]],
    objective: TaskObjective,
    *,
    micro_batch_tokens: int,
) -> tuple[Quality, dict[str, Quality]]:
    """Return the quality over all groups of examples together, and of each group."""
    parts = {
        name: evaluate(adapted, examples, objective, micro_batch_tokens=micro_batch_tokens)
        for name, examples in groups.items()
    }
    return reduce(Quality.__add__, parts.values(), Quality()), parts
