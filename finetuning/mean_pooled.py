"""A classifier on the mean of an encoder's last states, for checkpoints that were trained to be read so."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["MeanPooledClassifier"]


class MeanPooledClassifier(PreTrainedModel):
    """logits = W h̄ + b, where h̄ is the mean of the last layer's states over a text's own tokens.

    The head starts at zero: every class is equally likely before the first step, and no random direction has to be
    unlearned through the noise. Its tensors are named `classifier.weight` and `classifier.bias`, the body's begin with
    `body.`: no adapter of it fits a stock classifier, which would read another summary.
    """

    base_model_prefix = "body"
    supports_gradient_checkpointing = True
    # The body has chosen its attention when it was loaded; nothing here computes any.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, body: PreTrainedModel, classes: int) -> None:
        super().__init__(body.config)
        self.body = body
        # On the body's device and in its type; `adapters` widens a trained head to float32.
        like = next(body.parameters())
        self.classifier = nn.Linear(body.config.hidden_size, classes, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the body's."""
        return self.body.get_input_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        summaries: torch.Tensor | None = None,
        **others: Any,
    ) -> SequenceClassifierOutput:
        """Return the logits, shape (texts, classes), of texts or of their `summaries`, shape (texts, hidden)."""
        del others  # what PEFT passes on for networks that compute a loss
        if summaries is None:
            summaries = self.summaries(input_ids, attention_mask)
        return SequenceClassifierOutput(logits=self.classifier(summaries))

    def summaries(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return each text's h̄, shape (texts, hidden); zero for a row without a token."""
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if attention_mask is None:
            return states.mean(dim=1)
        kept = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
