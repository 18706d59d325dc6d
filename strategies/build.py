"""From a strategy's configuration to its algorithm: the one place that knows the family."""

from __future__ import annotations

from collections.abc import Callable

from conf.schema import strategy as schema
from strategies.base import Strategy
from strategies.lora.fedit import fedit
from strategies.lora.ffa_lora import ffa_lora

__all__ = ["STRATEGIES", "build_strategy"]

STRATEGIES: dict[type[schema.FedIT | schema.FFALoRA], Callable[[], Strategy]] = {
    schema.FedIT: fedit,
    schema.FFALoRA: ffa_lora,
}


def build_strategy(config: schema.Strategy) -> Strategy:
    """Return the algorithm that a validated configuration names."""
    return STRATEGIES[type(config)]()
