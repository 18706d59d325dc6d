"""What is protected, and at what price."""

from typing import Annotated, Literal

from pydantic import Field

from conf.schema.base import Frozen

__all__ = ["ExampleLevel", "NoPrivacy", "Privacy"]


class NoPrivacy(Frozen):
    """No protection: for comparison only. Every report says so."""

    kind: Literal["none"] = "none"


class ExampleLevel(Frozen):
    """DP-SGD inside each site: adding or removing one record changes what leaves by a bounded amount (ε, δ).

    Exactly one of `target_epsilon` (the noise is calibrated for the whole run) and `noise_multiplier` is given.
    """

    kind: Literal["example_level"] = "example_level"
    target_epsilon: float | None = Field(default=None, gt=0, le=100, description="ε for all rounds of a site together")
    noise_multiplier: float | None = Field(
        default=None, ge=0.2, le=1000, description="noise std over clip norm; below 0.2 no ε is worth its name"
    )
    delta: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="null: each site takes 1 / (10 x its published record count); 1/n of a site or more is refused",
    )
    clip_norm: float = Field(
        default=1.0, ge=1e-6, le=1e6, description="L2 bound on one record's gradient, over all trained tensors"
    )
    per_example_gradients: Literal["opacus", "one_by_one"] = Field(
        default="opacus",
        description="opacus: fast, refuses layers without a rule; one_by_one: exact for every architecture, slower",
    )
    insecure_seed: int | None = Field(
        default=None,
        ge=0,
        description="makes noise and sampling repeatable, and so guessable: simulation only, printed on every report",
    )


Privacy = Annotated[NoPrivacy | ExampleLevel, Field(discriminator="kind")]
