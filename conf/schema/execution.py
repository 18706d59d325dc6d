"""Settings that cannot touch the guarantee: where it runs, what is evaluated, what is shown."""

from typing import Annotated, Literal

from pydantic import Field

from conf.schema.base import Frozen

__all__ = ["Evaluation", "InProcess", "Logging", "Ray", "Runtime"]


class _Runtime(Frozen):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(
        default=None, ge=1, le=4096, description="torch threads per process; null: torch's own choice"
    )
    micro_batch_tokens: int = Field(
        default=8192,
        ge=1,
        le=1 << 30,
        description="padded tokens processed at once; changes memory and speed, never the result",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass instead of keeping them: less memory, about a third "
        "more time, never another result",
    )


class InProcess(_Runtime):
    """All sites in this process, one after the other, sharing one base model."""

    kind: Literal["in_process"] = "in_process"
    reply_delays_s: tuple[Annotated[float, Field(ge=0, le=1e8)], ...] = Field(
        default=(),
        description="simulated seconds that the first, second, ... site takes to answer, from the start again when "
        "there are more sites; the run does not wait for them. Empty: none",
    )


class Ray(_Runtime):
    """Flower's simulation engine: one base model per Ray actor."""

    kind: Literal["ray"] = "ray"
    cpus_per_site: float = Field(default=1.0, ge=1e-3, le=4096)
    gpus_per_site: float = Field(default=0.0, ge=0, le=1024)


Runtime = Annotated[InProcess | Ray, Field(discriminator="kind")]


class Evaluation(Frozen):
    """What the server measures on held-out text that it may see."""

    every: int = Field(
        default=2, ge=0, le=100_000, description="rounds between evaluations; 0: never. The last round is always one"
    )
    max_examples: int | None = Field(default=None, ge=1, le=1 << 31, description="held-out records used; null: all")
    public: bool = Field(
        default=False,
        description="held-out records are public, and nobody's privacy hangs on them: the best round by them is kept. "
        "Otherwise they are only measured on: a choice by private records would tell of them, at a price nobody states",
    )
    patience: int | None = Field(
        default=6,
        ge=1,
        le=100_000,
        description="with public: evaluations without a better one that end a run; null: none",
    )


class Logging(Frozen):
    """What is shown while a run goes on, and where its files go."""

    progress: Literal["auto", "rich", "plain", "none"] = Field(
        default="auto", description="auto: a live display on a terminal, plain lines elsewhere"
    )
    directory: str | None = Field(default=None, description="run directory; null: runs/DATE-TIME-NAME")
    keep_checkpoints: int = Field(default=3, ge=1, le=1_000_000, description="newest round checkpoints kept")
