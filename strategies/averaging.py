"""The common ground of most strategies: sites send differences, the server adds their weighted mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from conf.schema.federation import LocalTraining
from protocol.errors import ReplyRejected
from protocol.tensors import NamedTensors, add, subtract
from strategies.base import Aggregator, LocalOutcome, LocalRound, LocalStart, Names, ServerState
from strategies.lora.factors import cut
from strategies.mean import WeightedMean

__all__ = ["Averaging", "PlainClient", "PlainRound", "everything", "plain_round"]


@dataclass(frozen=True)
class Averaging:
    """The server half of federated averaging: x ← x + Σ pₖ Δₖ."""

    mean: Callable[[NamedTensors], Aggregator] = WeightedMean
    """From the adapter to an aggregator whose result is the weighted mean of the updates."""

    def init(self, adapter: NamedTensors) -> ServerState:
        """Return an empty state."""
        return ServerState()

    def download(self, adapter: NamedTensors, state: ServerState, names: Names, rank: int | None) -> NamedTensors:
        """Return the tensors `names` of the adapter, factors cut to `rank`."""
        return cut({name: adapter[name] for name in sorted(names)}, rank)

    def aggregator(self, adapter: NamedTensors, state: ServerState) -> Aggregator:
        """Return a weighted mean."""
        return self.mean(adapter)

    def step(
        self, adapter: NamedTensors, combined: NamedTensors, state: ServerState
    ) -> tuple[NamedTensors, ServerState]:
        """Return the adapter moved by the mean update."""
        return add(adapter, combined), state


class PlainClient:
    """The client half that trains from what it received, and sends the difference."""

    def begin(self, start: LocalStart) -> LocalRound:
        """Return a plain round."""
        return PlainRound(start)

    def verify_extras(self, extras: NamedTensors, adapter: NamedTensors) -> None:
        """Refuse every extra."""
        for name in extras:
            raise ReplyRejected("unknown_tensor", f"{name!r} is no tensor of this adapter")


@dataclass(frozen=True)
class PlainRound:
    """A round without a local objective of its own."""

    given: LocalStart

    @property
    def start(self) -> NamedTensors:
        """What was received."""
        return self.given.adapter

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Leave the gradients as they are."""

    def finish(self, after: NamedTensors) -> LocalOutcome:
        """Return trained minus received."""
        return LocalOutcome(subtract(after, self.start, self.given.uploaded))


def plain_round(adapter: NamedTensors, trained: Names, local: LocalTraining) -> PlainRound:
    """Return a round that trains and sends `trained`, from `adapter` alone."""
    return PlainRound(LocalStart(adapter, {}, {}, trained, trained, local, local.optimizer.learning_rate))


def everything(names: Names, round_number: int) -> Names:
    """Return all names, in every round."""
    return names
