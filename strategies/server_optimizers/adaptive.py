"""FedAdagrad, FedAdam and FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

m ← β₁ m + (1-β₁) Δ;  x ← x + η m / (√v + τ); they differ in v:

==========  ==============================
FedAdagrad  v ← v + Δ²
FedAdam     v ← β₂ v + (1-β₂) Δ²
FedYogi     v ← v - (1-β₂) Δ² sign(v - Δ²)
==========  ==============================

Both moments start at zero, where the paper starts v at τ² or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from conf.schema.server_optimizer import FedAdagrad, FedAdam, FedYogi
from strategies.server_optimizers.optimized import ServerOptimizer

__all__ = ["fedadagrad", "fedadam", "fedyogi"]

_SecondMoment = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From v and Δ² to the next v."""


def fedadagrad(config: FedAdagrad) -> ServerOptimizer:
    """Return FedAdagrad."""
    return _adaptive(config, lambda moment, square: moment + square)


def fedadam(config: FedAdam) -> ServerOptimizer:
    """Return FedAdam. With `bias_correction`, round t moves by η √(1-β₂ᵗ⁺¹) / (1-β₁ᵗ⁺¹), as Flower has it."""

    def rate(step: int) -> float:
        if not config.bias_correction:
            return config.learning_rate
        return config.learning_rate * math.sqrt(1 - config.beta2 ** (step + 1)) / (1 - config.beta1 ** (step + 1))

    return _adaptive(config, lambda moment, square: config.beta2 * moment + (1 - config.beta2) * square, rate)


def fedyogi(config: FedYogi) -> ServerOptimizer:
    """Return FedYogi."""
    return _adaptive(config, lambda moment, square: moment - (1 - config.beta2) * square * torch.sign(moment - square))


def _adaptive(
    config: FedAdagrad | FedAdam | FedYogi, second: _SecondMoment, rate: Callable[[int], float] | None = None
) -> ServerOptimizer:
    def update(
        gradient: torch.Tensor, slots: Mapping[str, torch.Tensor], step: int
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        first = config.beta1 * slots["first"] + (1 - config.beta1) * gradient
        moment = second(slots["second"], gradient.square())
        learning_rate = config.learning_rate if rate is None else rate(step)
        return learning_rate * first / (moment.sqrt() + config.tau), {"first": first, "second": moment}

    head_rate = config.head_learning_rate
    head_scale = 1.0 if head_rate is None else head_rate / config.learning_rate
    return ServerOptimizer(("first", "second"), update, head_scale)
