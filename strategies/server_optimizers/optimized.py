"""A server half whose combined update goes through an optimizer before it moves the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from protocol.tensors import NamedTensors
from strategies.base import Aggregator, Names, ServerHalf, ServerState

__all__ = ["OptimizedServer", "ServerOptimizer"]

_PREFIX = "server_optimizer."
_STEP = "server_optimizer.step"


@dataclass(frozen=True)
class ServerOptimizer:
    """An optimizer as a pure function, tensor by tensor."""

    slots: tuple[str, ...]
    """What it keeps for each tensor, zero at first."""
    update: Callable[[torch.Tensor, Mapping[str, torch.Tensor], int], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
    """From a pseudo-gradient (which points downhill), its slots and the step (from 1) to the move and the new slots."""
    head_scale: float = 1.0
    """Multiplies the moves of tensors that are trained whole, such as a classification head."""


@dataclass(frozen=True)
class OptimizedServer:
    """Another half, with a move in place of the combined update. What is noised stays so: this is post-processing."""

    inner: ServerHalf
    optimizer: ServerOptimizer

    def init(self, adapter: NamedTensors) -> ServerState:
        """Return the inner state; slots appear with the first update of their tensor."""
        return self.inner.init(adapter)

    def download(self, adapter: NamedTensors, state: ServerState, names: Names, rank: int | None) -> NamedTensors:
        """Return what the inner half sends."""
        return self.inner.download(adapter, state, names, rank)

    def aggregator(self, adapter: NamedTensors, state: ServerState) -> Aggregator:
        """Return the inner half's aggregator."""
        return self.inner.aggregator(adapter, state)

    def step(
        self, adapter: NamedTensors, combined: NamedTensors, state: ServerState
    ) -> tuple[NamedTensors, ServerState]:
        """Return the inner half's step by the optimizer's move."""
        step = int(state.numbers.get(_STEP, 0)) + 1
        moves: dict[str, torch.Tensor] = {}
        kept: dict[str, torch.Tensor] = {}
        for name, gradient in combined.items():
            before = {
                slot: state.tensors.get(f"{_PREFIX}{slot}.{name}", torch.zeros_like(gradient))
                for slot in self.optimizer.slots
            }
            moves[name], after = self.optimizer.update(gradient, before, step)
            if "lora_" not in name:
                moves[name] = moves[name] * self.optimizer.head_scale
            kept |= {f"{_PREFIX}{slot}.{name}": tensor for slot, tensor in after.items()}
        adapter, inner = self.inner.step(adapter, moves, state)
        # A tensor without an update in this round keeps its slots.
        return adapter, ServerState({**inner.tensors, **kept}, {**inner.numbers, _STEP: step})
