"""What the model is trained to do."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from conf.schema.base import Frozen

__all__ = ["CausalLM", "Classification", "Task"]


class CausalLM(Frozen):
    """Predict the next token; the metric is perplexity on trained tokens."""

    kind: Literal["causal_lm"] = "causal_lm"

    @property
    def labels(self) -> None:
        """None: a language model has no label set."""
        return None


class Classification(Frozen):
    """Assign one of `labels`; the metric is accuracy. The head is trained, sent and stored with the adapter."""

    kind: Literal["classification"] = "classification"
    labels: tuple[str, ...] = Field(min_length=2, description="public label set, in the order of the class indices")
    head: Literal["checkpoint", "new"] = Field(
        default="checkpoint",
        description="checkpoint: its classification head where it has one, which must be for these labels, else a new "
        "one; new: a new one from a public seed, whatever the checkpoint has",
    )
    pooling: Literal["auto", "mean", "model"] = Field(
        default="auto",
        description="what a new head reads. auto: the mean of the last layer where the checkpoint says that it was "
        "trained for it (1_Pooling/config.json), else model; mean: that mean; model: what the architecture's own "
        "classifier reads",
    )

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"labels must be distinct; repeated: {', '.join(repeated)}")
        return labels


Task = Annotated[CausalLM | Classification, Field(discriminator="kind")]
