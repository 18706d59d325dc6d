"""FedDyn (Acar et al. 2021, arXiv 2111.04263, algorithm 1).

A site minimizes Fₖ(w) - ⟨λₖ, w⟩ + α/2 ‖w - x‖² and then sets λₖ ← λₖ - α (wₖ - x), which it keeps. The server sets
h ← h - α/N Σₖ Δₖ over the cohort and x ← x + mean Δₖ - h/α. Only the update goes up. λₖ follows from noised parameters,
so that it costs no privacy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from protocol.tensors import NamedTensors, subtract
from strategies.base import (
    Aggregator,
    ClientHalf,
    Contribution,
    LocalOutcome,
    LocalRound,
    LocalStart,
    Names,
    ServerHalf,
    ServerState,
)
from strategies.extras import prefixed, without_prefix
from strategies.mean import UpdateSum
from strategies.objectives.fedprox import pull_back

__all__ = ["DynamicClient", "DynamicServer"]

_OWN = "feddyn.own."
_LINEAR = "feddyn.linear."
_NEXT = "feddyn.next."


@dataclass(frozen=True)
class DynamicClient:
    """Another client half with the linear and the quadratic term."""

    inner: ClientHalf
    alpha: float

    def begin(self, start: LocalStart) -> LocalRound:
        """Return the inner round; λₖ is zero at first."""
        own, kept = without_prefix(_OWN, start.memory)
        inner = self.inner.begin(replace(start, memory=kept))
        slopes = {
            name: own[name] if name in own else torch.zeros_like(start.adapter[name]) for name in sorted(start.trained)
        }
        return _DynamicRound(inner, slopes, self.alpha)

    def verify_extras(self, extras: NamedTensors, adapter: NamedTensors) -> None:
        """Leave it to the inner half."""
        self.inner.verify_extras(extras, adapter)


@dataclass(frozen=True)
class _DynamicRound:
    inner: LocalRound
    slopes: NamedTensors
    """λₖ."""
    alpha: float

    @property
    def start(self) -> NamedTensors:
        """Where the inner round starts."""
        return self.inner.start

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add α (w - x) - λₖ."""
        self.inner.correct(parameters)
        pull_back(parameters, self.start, self.alpha)
        for name, parameter in parameters.items():
            slope = self.slopes[name].to(parameter.device, parameter.dtype)
            parameter.grad = -slope if parameter.grad is None else torch.sub(parameter.grad, slope)

    def finish(self, after: NamedTensors) -> LocalOutcome:
        """Return the inner update, and keep λₖ - α (w - x)."""
        outcome = self.inner.finish(after)
        moved = subtract(after, self.start, frozenset(self.slopes))
        own = {name: slope - self.alpha * moved[name] for name, slope in self.slopes.items()}
        return LocalOutcome(outcome.update, {**outcome.memory, **prefixed(_OWN, own)})


@dataclass(frozen=True)
class DynamicServer:
    """Another server half that keeps h."""

    inner: ServerHalf
    alpha: float

    def init(self, adapter: NamedTensors) -> ServerState:
        """Return the inner state; h is zero at first."""
        return self.inner.init(adapter)

    def download(self, adapter: NamedTensors, state: ServerState, names: Names, rank: int | None) -> NamedTensors:
        """Return what the inner half sends: h stays at the server."""
        return self.inner.download(adapter, state, names, rank)

    def aggregator(self, adapter: NamedTensors, state: ServerState) -> Aggregator:
        """Return the inner aggregator, with the next h beside it."""
        linear, _ = without_prefix(_LINEAR, state.tensors)
        return _DynamicAggregator(
            self.inner.aggregator(adapter, state), linear, self.alpha, state.numbers.get("population")
        )

    def step(
        self, adapter: NamedTensors, combined: NamedTensors, state: ServerState
    ) -> tuple[NamedTensors, ServerState]:
        """Return the inner step by mean Δ - h/α, and the state with the next h."""
        linear, update = without_prefix(_NEXT, combined)
        move = {name: tensor - linear[name] / self.alpha for name, tensor in update.items()}
        adapter, inner = self.inner.step(adapter, move, state)
        return adapter, ServerState({**inner.tensors, **prefixed(_LINEAR, linear)}, inner.numbers)


class _DynamicAggregator:
    """Sums the updates a second time, without weights."""

    def __init__(self, inner: Aggregator, linear: NamedTensors, alpha: float, population: float | None) -> None:
        self._inner, self._linear, self._alpha, self._population = inner, linear, alpha, population
        self._sum = UpdateSum()
        self._count = 0

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one contribution."""
        self._inner.accumulate(contribution)
        self._sum.add(contribution.update)
        self._count += 1

    def result(self) -> NamedTensors:
        """Return the inner result, and the next h."""
        combined, share = self._inner.result(), self._alpha / (self._population or self._count)
        following: dict[str, torch.Tensor] = {}
        for name, total in self._sum.tensors.items():
            before = self._linear[name].double() if name in self._linear else torch.zeros_like(total)
            following[name] = (before - share * total).float()
        return {**combined, **prefixed(_NEXT, following)}

    def metrics(self) -> Mapping[str, float]:
        """Return the inner aggregator's."""
        return self._inner.metrics()
