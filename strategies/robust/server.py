"""A server half whose aggregator is a robust rule.

The updates of a round are all held until its end: memory grows with the cohort, but for the norm bound. Weights are not
looked at: what counts a site higher is what an attacker would claim. Under example-level privacy a rule sees noised
updates only, so it is post-processing; a client-level plan needs a sum, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import assert_never

from conf.schema import robust as schema
from conf.schema.robust import replies_needed
from protocol.errors import FederationError
from protocol.tensors import NamedTensors
from strategies.base import Aggregator, Contribution, Names, ServerHalf, ServerState
from strategies.extras import prefixed, without_prefix
from strategies.mean import checked_weight
from strategies.robust.centered_clipping import centered_clipping
from strategies.robust.coordinatewise import coordinate_median, trimmed_mean
from strategies.robust.fltrust import fltrust
from strategies.robust.geometric_median import geometric_median
from strategies.robust.krum import bulyan, multi_krum
from strategies.robust.mixing import mixed
from strategies.robust.norm_bound import NormBoundAggregator
from strategies.robust.updates import Updates, stack

__all__ = ["ROOT_PREFIX", "RobustServer", "robust_rule"]

ROOT_PREFIX = "robust.root."
"""Of the update that the server trained for FLTrust, in the state that an aggregator is made with."""
_LAST_PREFIX = "robust.last."

_Holding = (
    schema.CoordinateMedian
    | schema.TrimmedMean
    | schema.Krum
    | schema.MultiKrum
    | schema.Bulyan
    | schema.GeometricMedian
    | schema.CenteredClipping
    | schema.FLTrust
)


@dataclass(frozen=True)
class RobustServer:
    """Another server half, with a rule in place of its aggregator."""

    inner: ServerHalf
    config: schema.NormBound | _Holding

    def init(self, adapter: NamedTensors) -> ServerState:
        """Return the inner state."""
        return self.inner.init(adapter)

    def download(self, adapter: NamedTensors, state: ServerState, names: Names, rank: int | None) -> NamedTensors:
        """Return what the inner half sends."""
        return self.inner.download(adapter, state, names, rank)

    def aggregator(self, adapter: NamedTensors, state: ServerState) -> Aggregator:
        """Return the rule's aggregator."""
        config = self.config
        if isinstance(config, schema.NormBound):
            inner = self.inner.aggregator(adapter, state)
            return NormBoundAggregator(inner, adapter, config.max_norm, products=config.distance == "product")
        prefix = ROOT_PREFIX if isinstance(config, schema.FLTrust) else _LAST_PREFIX
        reference, _ = without_prefix(prefix, state.tensors)
        return _RobustAggregator(config, adapter, reference or None)

    def step(
        self, adapter: NamedTensors, combined: NamedTensors, state: ServerState
    ) -> tuple[NamedTensors, ServerState]:
        """Return the inner step; centered clipping keeps the update for the next round."""
        adapter, inner = self.inner.step(adapter, combined, state)
        _, kept = without_prefix(ROOT_PREFIX, inner.tensors)
        if isinstance(self.config, schema.CenteredClipping):
            kept |= prefixed(_LAST_PREFIX, combined)
        return adapter, ServerState(kept, inner.numbers)


class _RobustAggregator:
    """Holds a round's updates, and applies a rule to them."""

    def __init__(self, config: _Holding, adapter: NamedTensors, reference: NamedTensors | None) -> None:
        self._config, self._adapter, self._reference = config, adapter, reference
        self._updates: list[NamedTensors] = []
        self._starts: list[NamedTensors] = []

    def accumulate(self, contribution: Contribution) -> None:
        """Keep a copy of one update."""
        checked_weight(contribution.weight)
        self._updates.append({name: tensor.clone() for name, tensor in contribution.update.items()})
        self._starts.append({**self._adapter, **contribution.start})

    def result(self) -> NamedTensors:
        """Return what the rule makes of the updates.

        Raises:
            FederationError: too few of them for the number of attackers to be withstood.
            ValueError: none, or of several layouts.
        """
        config = self._config
        updates = stack(self._updates, self._starts, products=config.distance == "product", reference=self._reference)
        needed = replies_needed(config)
        if len(self._updates) < needed:
            raise FederationError(
                f"robust={config.kind} withstands {config.attackers} attackers among {needed} valid replies or more, "
                f"the round has {len(self._updates)}; lower strategy.robust.attackers, or raise federation.min_replies "
                f"and the cohort to {needed}"
            )
        return robust_rule(config)(mixed(updates, config.mixing, config.attackers))

    def metrics(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}


def robust_rule(config: _Holding) -> Callable[[Updates], NamedTensors]:
    """Return the rule that a configuration names."""
    f = config.attackers
    match config:
        case schema.CoordinateMedian():
            return coordinate_median
        case schema.TrimmedMean():
            return lambda updates: trimmed_mean(updates, f)
        case schema.Krum():
            return lambda updates: multi_krum(updates, f, 1)
        case schema.MultiKrum():
            selected = config.selected
            return lambda updates: multi_krum(updates, f, len(updates) - f if selected is None else selected)
        case schema.Bulyan():
            return lambda updates: bulyan(updates, f)
        case schema.GeometricMedian():
            return lambda updates: geometric_median(updates, config.iterations, config.smoothing)
        case schema.CenteredClipping():
            return lambda updates: centered_clipping(updates, config.radius, config.iterations)
        case schema.FLTrust():
            return fltrust
        case _:
            assert_never(config)
