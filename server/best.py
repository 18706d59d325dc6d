"""The best round by public held-out records, and the round at which a run had better end.

Held-out records are as private as the others unless `evaluation.public` says that they are not: a choice by private
ones would tell of them, and no ε is stated for it. A run that ruins its model ends either way, as its figures tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.schema.execution import Evaluation
from finetuning.checkpoints import load_tensors, save_tensors
from protocol.tensors import NamedTensors
from server.events import Evaluated, Event
from server.summary import is_better

__all__ = ["BestRound", "best_evaluation", "load_best", "save_best", "why_it_stops"]

_FILE = "best.safetensors"
_RUINED = math.log(10)
"""Nats above the base's loss: a perplexity of ten times the base's."""


@dataclass(frozen=True)
class BestRound:
    """A round's number and its adapter."""

    round: int
    adapter: NamedTensors


def best_evaluation(events: Sequence[Event]) -> Evaluated | None:
    """Return the best evaluation of a round so far, the earliest of equals; None before the first.

    The base is among them, as round 0: where no round is better, the adapter that training starts from is the best.
    """
    best: Evaluated | None = None
    for event in events:
        if isinstance(event, Evaluated) and (best is None or is_better(event.metric, event.value, best.value)):
            best = event
    return best


def why_it_stops(config: Evaluation, events: Sequence[Event]) -> str | None:
    """Return why a run had better end with its newest round, or None: its model is ruined, or no longer gets better.

    That is a model far worse than the base by its loss on held-out records; or, where these are public, as many
    evaluations in a row without a better one as `evaluation.patience` says.
    """
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    best = best_evaluation(events)
    if best is None or len(evaluations) < 2:
        return None
    base, newest = evaluations[0], evaluations[-1]
    if base.round == 0 and not newest.loss <= base.loss + _RUINED:  # a loss that is no number is not
        return (
            f"round {newest.round} left a model far worse than the base: its loss on held-out records is "
            f"{newest.loss:.3g} nats, the base's {base.loss:.3g}; no more of any budget is spent. Lower the learning "
            "rates (federation.local.optimizer, strategy.server_optimizer), or leave them to the product"
        )
    waited = len(evaluations) - 1 - evaluations.index(best)
    if config.public and config.patience is not None and waited >= config.patience:
        return f"{waited} evaluations in a row were no better than that of round {best.round}"
    return None


def save_best(folder: Path, best: BestRound, *, run: str) -> None:
    """Store the best round in a run's folder of checkpoints, atomically."""
    save_tensors(folder / _FILE, dict(best.adapter), {"run": run, "round": str(best.round)})


def load_best(folder: Path, *, run: str) -> BestRound | None:
    """Return the stored best round of a run; None where there is none."""
    path = folder / _FILE
    if not path.is_file():
        return None
    tensors, metadata = load_tensors(path)
    return BestRound(int(metadata["round"]), tensors) if metadata.get("run") == run else None
