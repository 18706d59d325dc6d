"""What every strategy is made of: names, a server half and a client half, each of which can be wrapped.

A strategy is a value. `tensors` says which parts of the adapter move, which travel, and when; `server` turns updates
into the next adapter; `client` says how a site starts, corrects its gradients and shapes its update. Server
optimizers, robust rules and local objectives wrap one half and leave the rest (`strategies/build.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, Protocol

from torch import nn

from conf.schema.federation import LocalTraining
from protocol.tensors import NamedTensors

__all__ = [
    "Aggregator",
    "ClientHalf",
    "Contribution",
    "LocalOutcome",
    "LocalRound",
    "LocalStart",
    "Names",
    "Sensitivity",
    "ServerHalf",
    "ServerState",
    "Strategy",
    "TensorRule",
]

Names = frozenset[str]
TensorRule = Callable[[Names, int], Names]
"""From the adapter's tensor names and the round (from 1) to the names chosen."""
Sensitivity = Literal["weighted_clip_norm", "unbounded"]
"""What a site whose update was cut to the clip norm changes at most of the sum, in L2 norm over all that is uploaded:
its weight times the clip norm, or nothing that is known, and client-level privacy is refused."""


@dataclass(frozen=True)
class ServerState:
    """What the server keeps from round to round besides the adapter. Every checkpoint stores it.

    `numbers["population"]` is the number of enrolled sites; a half that steps passes on what is not its own.
    """

    tensors: NamedTensors = field(default_factory=lambda: MappingProxyType({}))
    numbers: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Contribution:
    """One site's verified reply.

    `update` is trained minus received, for the tensors that are uploaded; `start` is what that site received, which may
    be a slice of the adapter where ranks differ; `steps` are the optimizer steps it took, at `learning_rate`, and
    `effective_steps` what its optimizer made of them: a constant gradient g would have moved it by
    -learning_rate · effective_steps · g.
    """

    update: NamedTensors
    weight: float
    start: NamedTensors = field(default_factory=lambda: MappingProxyType({}))
    steps: int = 1
    site: str = ""
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    learning_rate: float = 1.0
    effective_steps: float = 1.0


class Aggregator(Protocol):
    """Folds one round's contributions, one at a time; a linear one keeps memory that does not grow with the cohort."""

    def accumulate(self, contribution: Contribution) -> None:
        """Fold one site's contribution.

        Raises:
            ValueError: a weight that is not positive and finite.
        """
        ...

    def result(self) -> NamedTensors:
        """Return the combined update.

        Raises:
            ValueError: when nothing was accumulated.
        """
        ...

    def metrics(self) -> Mapping[str, float]:
        """Return what is worth logging of this round's updates; it is computed from them alone."""
        ...


class ServerHalf(Protocol):
    """Adapters and states go in and out; nothing is kept in between."""

    def init(self, adapter: NamedTensors) -> ServerState:
        """Return the state before round 1."""
        ...

    def download(self, adapter: NamedTensors, state: ServerState, names: Names, rank: int | None) -> NamedTensors:
        """Return what a site receives: the tensors `names`, cut to `rank` where that is not None, and what its half
        of the strategy needs besides, under names that no adapter has."""
        ...

    def aggregator(self, adapter: NamedTensors, state: ServerState) -> Aggregator:
        """Return a fresh aggregator for one round."""
        ...

    def step(
        self, adapter: NamedTensors, combined: NamedTensors, state: ServerState
    ) -> tuple[NamedTensors, ServerState]:
        """Return the next adapter and state. The adapter may have grown offsets (`protocol/offsets.py`)."""
        ...


@dataclass(frozen=True)
class LocalStart:
    """What a site starts a round from."""

    adapter: NamedTensors
    """Every adapter tensor: what was received, and what follows from the public seed."""
    extras: NamedTensors
    """What else was received."""
    memory: NamedTensors
    """What this site kept from the last round that it took part in; empty at first."""
    trained: Names
    uploaded: Names
    local: LocalTraining
    learning_rate: float
    """Of this round, after its decay."""


@dataclass(frozen=True)
class LocalOutcome:
    """What leaves, and what stays."""

    update: NamedTensors
    memory: NamedTensors = field(default_factory=lambda: MappingProxyType({}))


class LocalRound(Protocol):
    """One round at one site. Every method sees noised gradients and parameters only, so it is post-processing."""

    @property
    def start(self) -> NamedTensors:
        """The whole adapter to train from."""
        ...

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add what the local objective adds to each `.grad`: called in every step, after noise."""
        ...

    def finish(self, after: NamedTensors) -> LocalOutcome:
        """Return the update to send, from the whole adapter after training."""
        ...


class ClientHalf(Protocol):
    """How a site trains."""

    def begin(self, start: LocalStart) -> LocalRound:
        """Return the round that starts from `start`."""
        ...

    def verify_extras(self, extras: NamedTensors, adapter: NamedTensors) -> None:
        """Check what was received besides the adapter's own tensors.

        Raises:
            ReplyRejected: an extra that this strategy does not send, or one of the wrong shape.
        """
        ...


@dataclass(frozen=True)
class Strategy:
    """One algorithm."""

    is_linear: bool
    """Whether the combined update is a weighted sum of the updates, so that it could be computed under encryption."""
    sensitivity: Sensitivity
    post_processes_sum: bool
    """Whether what the server does next needs the sum of the updates alone: with noise on that sum it is
    post-processing, and costs nothing. Otherwise it reads every update, and client-level privacy is refused."""
    server: ServerHalf
    client: ClientHalf
    trained: TensorRule
    """What a site trains. The rest keeps its values."""
    uploaded: TensorRule
    """What it sends of that."""
    downloaded: TensorRule
    """What it needs to be sent. It derives the rest from the public seed, or keeps it itself."""
    has_memory: bool = False
    """Whether sites keep tensors from round to round."""
    takes_ranks: bool = False
    """Whether sites may train at lower ranks than the plan's, each on a cut of the factors."""
    initial: Callable[[NamedTensors], NamedTensors] = lambda adapter: adapter
    """From the adapter as PEFT initializes it to the one before round 1."""

    def with_server(self, server: ServerHalf) -> Strategy:
        """Return this strategy with a server half that makes another thing of the updates than their sum."""
        return replace(self, is_linear=False, sensitivity="unbounded", post_processes_sum=False, server=server)
