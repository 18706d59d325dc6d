"""Next-token prediction.

The loss that `transformers` computes from `labels=` divides by the tokens of the whole *batch*, so one record's length
rescales every other record's gradient, and removing a record can change the clipped sum by more than the clip norm
(measured: up to 1.8 times). Here each record's loss is the mean over its own tokens.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from finetuning.batches import IGNORED, Batch
from finetuning.tasks.base import Quality

__all__ = ["CausalLMObjective"]


class CausalLMObjective:
    """Mean negative log-likelihood of a record's trained tokens; evaluated as perplexity over all trained tokens."""

    metric = "perplexity"
    higher_is_better = False

    def losses(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean NLL per example in nats, shape (examples,); 0 for an example without a trained token."""
        per_token, trained = _token_losses(network, batch)
        return per_token.sum(dim=1) / trained.sum(dim=1).clamp(min=1)

    def quality(self, network: nn.Module, batch: Batch) -> Quality:
        """Return the NLL summed over trained tokens."""
        per_token, trained = _token_losses(network, batch)
        return Quality(loss_sum=float(per_token.double().sum()), units=int(trained.sum()))

    def headline(self, quality: Quality) -> float:
        """Return the perplexity, exp of the mean NLL per token; infinity where that overflows."""
        return math.exp(quality.loss) if quality.loss < 700 else math.inf


def _token_losses(network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the NLL of each next token (0 where not trained) and the mask, both of shape (examples, length - 1)."""
    logits = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    targets = batch.targets[:, 1:]
    # float32: a 16-bit softmax over a large vocabulary loses the digits that training needs.
    flat = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view_as(targets), targets != IGNORED
