"""SCAFFOLD with option II (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1).

A site corrects each gradient by c - cₖ and then sets cₖ ← cₖ - c + (x - yₖ) / (K η). The server needs no more than the
update Δₖ = yₖ - x to know that change: Δcₖ = -c - Δₖ / (K η), so nothing but the update goes up; c comes down beside
the adapter, and cₖ stays in the site's memory. With heavy-ball momentum K is ‖a‖₁ (`local_steps.py`), which keeps
(x - yₖ) / (‖a‖₁ η) a weighted mean of the round's corrected gradients; AdamW is refused.

The control variates are made of noised gradients: under example-level privacy they are post-processing. A site whose
reply is not used has moved its cₖ and the server has not: its next instruction says so, and it takes that back. Where
that instruction is lost too, c stays off the mean of the cₖ by that change over N. A codec would put the error of every
update between the two, so none is allowed.
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
from strategies.extras import prefixed, verify_copies, without_prefix
from strategies.mean import UpdateSum
from strategies.objectives.local_steps import effective_steps

__all__ = ["ScaffoldClient", "ScaffoldServer"]

_COMMON = "scaffold.common."
_OWN = "scaffold.own."
_CHANGE = "scaffold.change."


@dataclass(frozen=True)
class ScaffoldClient:
    """Another client half with control variates."""

    inner: ClientHalf

    def begin(self, start: LocalStart) -> LocalRound:
        """Return the inner round, corrected by what was received and kept; both are zero at first."""
        own, kept = without_prefix(_OWN, start.memory)
        common, extras = without_prefix(_COMMON, start.extras)
        inner = self.inner.begin(replace(start, extras=extras, memory=kept))
        shifts = {
            name: _or_zero(common, name, start.adapter) - _or_zero(own, name, start.adapter)
            for name in sorted(start.trained)
        }
        reach = start.learning_rate * effective_steps(start.local.optimizer, start.local.steps)
        return _ScaffoldRound(inner, shifts, reach)

    def verify_extras(self, extras: NamedTensors, adapter: NamedTensors) -> None:
        """Check the server's control variate."""
        common, others = without_prefix(_COMMON, extras)
        verify_copies(common, adapter, "the control variate")
        self.inner.verify_extras(others, adapter)


@dataclass(frozen=True)
class _ScaffoldRound:
    inner: LocalRound
    shifts: NamedTensors
    """c - cₖ."""
    reach: float
    """K η."""

    @property
    def start(self) -> NamedTensors:
        """Where the inner round starts."""
        return self.inner.start

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add c - cₖ."""
        self.inner.correct(parameters)
        for name, parameter in parameters.items():
            shift = self.shifts[name].to(parameter.device, parameter.dtype)
            parameter.grad = shift if parameter.grad is None else torch.add(parameter.grad, shift)

    def finish(self, after: NamedTensors) -> LocalOutcome:
        """Return the inner update, and keep cₖ - c + (x - y) / (K η)."""
        outcome = self.inner.finish(after)
        moved = subtract(after, self.start, frozenset(self.shifts))
        own = {name: -shift - moved[name] / self.reach for name, shift in self.shifts.items()}
        return LocalOutcome(outcome.update, {**outcome.memory, **prefixed(_OWN, own)})


@dataclass(frozen=True)
class ScaffoldServer:
    """Another server half that keeps c, the mean of all sites' control variates."""

    inner: ServerHalf

    def init(self, adapter: NamedTensors) -> ServerState:
        """Return the inner state: c is zero, and not sent, before round 2."""
        return self.inner.init(adapter)

    def download(self, adapter: NamedTensors, state: ServerState, names: Names, rank: int | None) -> NamedTensors:
        """Return what the inner half sends, and c."""
        common = {name: tensor for name, tensor in state.tensors.items() if name.startswith(_COMMON)}
        return {**self.inner.download(adapter, state, names, rank), **common}

    def aggregator(self, adapter: NamedTensors, state: ServerState) -> Aggregator:
        """Return the inner aggregator, with the change of c beside it."""
        common, _ = without_prefix(_COMMON, state.tensors)
        return _ScaffoldAggregator(self.inner.aggregator(adapter, state), common, state.numbers.get("population"))

    def step(
        self, adapter: NamedTensors, combined: NamedTensors, state: ServerState
    ) -> tuple[NamedTensors, ServerState]:
        """Return the inner step; c moves by the sites' mean change."""
        change, update = without_prefix(_CHANGE, combined)
        adapter, inner = self.inner.step(adapter, update, state)
        common = {
            _COMMON + name: tensor + state.tensors[_COMMON + name] if _COMMON + name in state.tensors else tensor
            for name, tensor in change.items()
        }
        return adapter, ServerState({**inner.tensors, **common}, inner.numbers)


class _ScaffoldAggregator:
    """Sums Δcₖ over the cohort."""

    def __init__(self, inner: Aggregator, common: NamedTensors, population: float | None) -> None:
        self._inner, self._common, self._population = inner, common, population
        self._sum = UpdateSum()
        self._count = 0

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one contribution."""
        self._inner.accumulate(contribution)
        reach = contribution.learning_rate * contribution.effective_steps
        self._sum.add(contribution.update, -1 / reach)
        self._count += 1

    def result(self) -> NamedTensors:
        """Return the inner result, and (1/N) Σₖ Δcₖ."""
        combined, population = self._inner.result(), self._population or self._count
        totals = self._sum.tensors
        change = {
            name: ((total - self._count * _or_zero(self._common, name, totals).double()) / population).float()
            for name, total in totals.items()
        }
        return {**combined, **prefixed(_CHANGE, change)}

    def metrics(self) -> Mapping[str, float]:
        """Return the inner aggregator's."""
        return self._inner.metrics()


def _or_zero(tensors: NamedTensors, name: str, like: NamedTensors) -> torch.Tensor:
    return tensors[name] if name in tensors else torch.zeros_like(like[name])
