"""What a frozen encoder makes of each record, computed once: all that is needed where only the head on it is trained.

The encoder is the same in every round, and no adapter changes it, so a record's summary is too. Training a head then
costs one forward pass per record and run instead of one per draw, and every step can use every record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from finetuning.adapters import AdaptedModel
from finetuning.batches import Batch, Example
from finetuning.mean_pooled import MeanPooledClassifier
from finetuning.padding import BatchShape
from finetuning.units import MicroBatches

__all__ = ["reads_summaries", "summaries_of", "summarized"]

_HEAD = "base_model.model.classifier."
_NOTHING = np.zeros(1, dtype=np.int32)
"""Stands for a summarized record's tokens, which nobody reads."""


def reads_summaries(adapted: AdaptedModel) -> bool:
    """Return whether all that the adapter changes comes after a summary of the text."""
    is_pooled = isinstance(adapted.base.network, MeanPooledClassifier)
    return is_pooled and all(name.startswith(_HEAD) for name in adapted.names)


def summaries_of(adapted: AdaptedModel, batch: Batch) -> torch.Tensor:
    """Return a batch's summaries, shape (rows, hidden) in float32, without dropout."""
    network = adapted.base.network
    if not isinstance(network, MeanPooledClassifier):
        raise TypeError(f"{type(network).__name__} makes no summary")
    network.eval()
    with torch.no_grad():
        return network.summaries(batch.input_ids, batch.attention_mask).float()


def summarized(
    adapted: AdaptedModel,
    examples: Sequence[Example],
    *,
    micro_batch_tokens: int,
    max_rows: int | None = None,
    longest: int | None = None,
    static_shapes: bool = False,
    alike: Callable[[BatchShape], bool] | None = None,
) -> tuple[Example, ...]:
    """Return the examples, in their order, with their summaries in place of their tokens.

    Args:
        adapted: a network for which `reads_summaries` holds.
        examples: tokenized records.
        micro_batch_tokens: padded tokens per forward pass; changes memory and speed, not the result.
        max_rows: bound on the records of a forward pass, or None.
        longest: public bound on a record's tokens.
        static_shapes: pad every forward pass to one shape.
        alike: whether the rows of a batch of this shape are computed as each one alone is; where they are not, each is
            computed alone, so that no record's summary depends on the others. None: it does not matter.
    """
    batches = MicroBatches.of(
        examples,
        None,
        adapted.base.pad_token_id,
        max_tokens=micro_batch_tokens,
        max_units=max_rows,
        longest=longest,
        static_shapes=static_shapes,
        alike=alike or (lambda _: True),
    )
    made: dict[int, Example] = {}
    for part in batches.of_step(range(len(examples))):
        rows = summaries_of(adapted, part.batch.to(adapted.base.device)).cpu().numpy()
        for position, row in zip(part.positions, rows, strict=False):  # padding rows come last
            nothing_learned = np.zeros(1, dtype=np.bool_)
            made[position] = replace(
                examples[position], input_ids=_NOTHING, trained=nothing_learned, summary=row.copy()
            )
    return tuple(made[position] for position in range(len(examples)))
