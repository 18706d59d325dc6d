"""What every strategy offers."""

from __future__ import annotations

from typing import Protocol

from protocol.tensors import NamedTensors

__all__ = ["Aggregator", "Strategy"]


class Aggregator(Protocol):
    """Folds updates one at a time, so that memory does not grow with the cohort."""

    def accumulate(self, update: NamedTensors, weight: float) -> None:
        """Fold one site's verified update."""
        ...

    def result(self) -> NamedTensors:
        """Return the combined update.

        Raises:
            ValueError: when nothing was accumulated.
        """
        ...


class Strategy(Protocol):
    """One algorithm, both halves. Adapters go in and out; nothing is kept in between."""

    is_linear: bool
    """Whether the combined update is a weighted sum of the updates, so that it could be computed under encryption."""

    def trained(self, names: frozenset[str]) -> frozenset[str]:
        """Return the tensors that a site trains and sends. The others keep their initial values everywhere."""
        ...

    def aggregator(self) -> Aggregator:
        """Return a fresh aggregator for one round."""
        ...

    def step(self, adapter: NamedTensors, combined: NamedTensors) -> NamedTensors:
        """Return the next adapter."""
        ...
