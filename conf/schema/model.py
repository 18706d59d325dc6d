"""The frozen base model and the adapter trained on top of it."""

import math
from typing import Literal

from pydantic import Field

from conf.schema.base import Frozen

__all__ = ["Dtype", "LoRA", "Model"]

Dtype = Literal["fp32", "bf16", "fp16"]
"""How a base holds its weights and computes."""


class Model(Frozen):
    """A `transformers` model: a folder, a hub id, or `embedded:clinic-base`."""

    path: str = Field(min_length=1, description="folder (~ is home), hub id, or embedded:NAME")
    revision: str | None = Field(default=None, description="commit or tag of a hub id")
    dtype: Dtype = Field(default="fp32", description="of the base; the adapter stays fp32")
    weight_format: Literal["full"] = Field(default="full", description="how base weights are held in memory")


class LoRA(Frozen):
    """LoRA through `peft` (Hu et al. 2021), with rsLoRA (arXiv 2312.03732) and DoRA (arXiv 2402.09353)."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, le=1024)
    alpha: float = Field(
        default=16.0, ge=1e-3, le=1e5, description="the update is scaled by alpha/rank (alpha/sqrt(rank) for rsLoRA)"
    )
    dropout: float = Field(default=0.0, ge=0, le=0.95)
    targets: Literal["auto", "none"] | tuple[str, ...] = Field(
        default="auto",
        description="auto: every linear layer of the architecture's blocks; none: no layer, a classification head is "
        "trained alone; or module name endings",
    )
    rslora: bool = False
    dora: bool = False

    def at_rank(self, rank: int) -> "LoRA":
        """Return the same adapter at another rank, with the scale of this one."""
        share = rank / self.rank
        alpha = self.alpha * (math.sqrt(share) if self.rslora else share)
        return self.model_copy(update={"rank": rank, "alpha": alpha})
