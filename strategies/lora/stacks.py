"""Sums of products in stacked form: Σ wₖ BₖAₖ = [w₁B₁, …, w_K B_K] [A₁; …; A_K], and adapters that fold them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from protocol.errors import ReplyRejected
from protocol.offsets import is_offset, modules_with_offsets, offset_names, verify_offset
from protocol.tensors import NamedTensors, add
from strategies.averaging import Averaging, PlainClient, PlainRound
from strategies.base import Contribution, LocalRound, LocalStart, Names, ServerState
from strategies.lora.drift import trained_tensor
from strategies.lora.factors import LoraLayer, lora_layers, no_factors
from strategies.lora.spectral import truncated
from strategies.mean import WeightedMean

__all__ = ["FoldingClient", "FoldingServer", "Stack", "StackedMean", "offset_tensors"]


class Stack:
    """One layer's running Σ wₖ BₖAₖ in factors; above min(m, n) columns it is recompressed without loss."""

    def __init__(self) -> None:
        self._left: list[torch.Tensor] = []
        self._right: list[torch.Tensor] = []

    def add(self, left: torch.Tensor, right: torch.Tensor, weight: float = 1.0) -> None:
        """Add w · left·right, (m x k) and (k x n)."""
        self._left.append(left * weight)
        self._right.append(right)
        most = min(len(left), right.shape[1])
        if sum(len(part) for part in self._right) > 2 * most:
            self._compress(most)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum as (m x k) and (k x n), k at most min(m, n)."""
        most = min(len(self._left[0]), self._right[0].shape[1])
        if sum(len(part) for part in self._right) > most:
            self._compress(most)
        return torch.cat(self._left, dim=1), torch.cat(self._right)

    def _compress(self, most: int) -> None:
        left, right = truncated(torch.cat(self._left, dim=1), torch.cat(self._right), most)
        self._left, self._right = [left], [right]


class StackedMean:
    """Σ pₖ BₖAₖ of every layer, exact, and the weighted mean of all other tensors."""

    def __init__(
        self,
        adapter: NamedTensors,
        finish: Callable[[LoraLayer, torch.Tensor, torch.Tensor], NamedTensors],
    ) -> None:
        """Start empty.

        Args:
            adapter: the server's.
            finish: from a layer and the factors of its mean product to the part of the combined update that they give.
        """
        self._adapter, self._finish = adapter, finish
        self._layers = lora_layers(frozenset(adapter))
        self._stacks = {layer.module: Stack() for layer in self._layers}
        self._others = WeightedMean(adapter)
        self._weight = 0.0

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one site's update; it may be of a lower rank."""
        others = no_factors(frozenset(contribution.update), 1)
        update = {name: contribution.update[name] for name in others}
        self._others.accumulate(Contribution(update, contribution.weight))
        for layer in self._layers:
            names = (layer.zero, layer.random)
            left, right = layer.read({name: trained_tensor(contribution, self._adapter, name) for name in names})
            self._stacks[layer.module].add(left, right, contribution.weight)
        self._weight += contribution.weight

    def result(self) -> NamedTensors:
        """Return the combined update."""
        combined = dict(self._others.result())
        for layer in self._layers:
            left, right = self._stacks[layer.module].factors()
            combined |= self._finish(layer, left / self._weight, right)
        return combined

    def metrics(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}


@dataclass(frozen=True)
class FoldingServer(Averaging):
    """A server half whose combined update may hold offsets, which add up from round to round.

    They stay in factors, (m x k) and (k x n) with k at most min(m, n), and every site gets all of them: one that joins
    late, or missed a round, needs nothing else.
    """

    def download(self, adapter: NamedTensors, state: ServerState, names: Names, rank: int | None) -> NamedTensors:
        """Return the tensors `names`, and every offset."""
        offsets = {name: tensor for name, tensor in adapter.items() if is_offset(name)}
        return {**super().download(adapter, state, names, rank), **offsets}

    def step(
        self, adapter: NamedTensors, combined: NamedTensors, state: ServerState
    ) -> tuple[NamedTensors, ServerState]:
        """Return the adapter moved by the means, the offsets folded in."""
        moved = add(adapter, {name: tensor for name, tensor in combined.items() if not is_offset(name)})
        for module in modules_with_offsets(combined):
            moved |= _folded(module, adapter, combined)
        return moved, state


class FoldingClient(PlainClient):
    """The client half that trains beside the offsets that it receives."""

    def begin(self, start: LocalStart) -> LocalRound:
        """Return a plain round."""
        return _FoldedRound(start)

    def verify_extras(self, extras: NamedTensors, adapter: NamedTensors) -> None:
        """Check that every extra is an offset of a layer, of the right shapes."""
        layers = {layer.module: layer for layer in lora_layers(frozenset(adapter))}
        for name in extras:
            if not is_offset(name) or name.rpartition(".")[0] not in layers:
                raise ReplyRejected("unknown_tensor", f"{name!r} is no tensor of this adapter")
        for module in modules_with_offsets(extras):
            left, right = layers[module].read(adapter)
            verify_offset(extras, module, left.shape[0], right.shape[1])


@dataclass(frozen=True)
class _FoldedRound(PlainRound):
    @property
    def start(self) -> NamedTensors:
        """What was received, offsets too."""
        return {**self.given.adapter, **self.given.extras}


def offset_tensors(module: str, left: torch.Tensor, right: torch.Tensor) -> NamedTensors:
    """Return an offset's factors by name, float32."""
    return dict(zip(offset_names(module), (left.float().contiguous(), right.float().contiguous()), strict=True))


def _folded(module: str, adapter: NamedTensors, combined: NamedTensors) -> NamedTensors:
    stack, names = Stack(), offset_names(module)
    for source in (adapter, combined):
        if names[0] in source:
            stack.add(source[names[0]].double(), source[names[1]].double())
    return offset_tensors(module, *stack.factors())
