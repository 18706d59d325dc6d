"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335, section 4.3): v ← β v + Δ, x ← x + η v."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from conf.schema.server_optimizer import FedAvgM
from strategies.server_optimizers.optimized import ServerOptimizer

__all__ = ["fedavgm"]


def fedavgm(config: FedAvgM) -> ServerOptimizer:
    """Return heavy-ball momentum without dampening."""

    def update(
        gradient: torch.Tensor, slots: Mapping[str, torch.Tensor], step: int
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        velocity = config.momentum * slots["velocity"] + gradient
        return config.learning_rate * velocity, {"velocity": velocity}

    return ServerOptimizer(("velocity",), update)
