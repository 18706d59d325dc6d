"""From a strategy's configuration to its algorithm: the one place that knows the family."""

from __future__ import annotations

from collections.abc import Callable

from conf.schema import strategy as schema
from strategies.base import Strategy
from strategies.lora.cores import fedsb, ravan
from strategies.lora.fedex import fedex
from strategies.lora.fedit import fedit
from strategies.lora.fedrot import fedrot
from strategies.lora.fedsa import fedsa
from strategies.lora.fedsvd import fedsvd
from strategies.lora.ffa_lora import ffa_lora
from strategies.lora.flexlora import flexlora
from strategies.lora.flora import flora
from strategies.lora.hetlora import hetlora
from strategies.lora.rolora import rolora

__all__ = ["STRATEGIES", "build_strategy"]

STRATEGIES: dict[type[schema.Strategy], Callable[[], Strategy]] = {
    schema.FedIT: fedit,
    schema.FFALoRA: ffa_lora,
    schema.RoLoRA: rolora,
    schema.FedSALoRA: fedsa,
    schema.FedSVD: fedsvd,
    schema.FedRot: fedrot,
    schema.FLoRA: flora,
    schema.FedEx: fedex,
    schema.FlexLoRA: flexlora,
    schema.HetLoRA: hetlora,
    schema.FedSB: fedsb,
    schema.Ravan: ravan,
}


def build_strategy(config: schema.Strategy) -> Strategy:
    """Return the algorithm that a validated configuration names."""
    return STRATEGIES[type(config)]()
