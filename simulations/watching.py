"""Watching real training from outside: nothing in the code that trains knows that it is watched.

Records are seen when they are looked up, gradients when the optimizer is given them (torch's own global hook).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import nn

from client.rounds import SiteRecords, answer, rehearse
from client.site import Site
from client.units import Units
from conf.schema.privacy import LocalPrivacy
from conf.schema.site import SiteFile
from finetuning.adapters import AdaptedModel
from finetuning.batches import Example
from finetuning.rows import Row
from privacy.doctor.subject import ObservedStep
from privacy.mechanisms import SubsampledGaussian
from privacy.plan import PrivacyPlan
from protocol.instructions import ClientPlan, Instruction, Reply

__all__ = ["StepLog", "WatchedSite", "frozen_digest", "gradient_of", "silenced"]

_COORDINATES = 4096
"""Values of each tensor that are kept per step: enough for the tests, little memory for a large adapter."""


@dataclass
class StepLog:
    """What was seen since the last step, and the steps of the current round."""

    looked_up: set[int] = field(default_factory=lambda: set[int]())
    steps: list[ObservedStep] = field(default_factory=lambda: list[ObservedStep]())

    def step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Take one optimizer step's input."""
        gradient = tuple(_thinned(gradient_of(p)) for group in optimizer.param_groups for p in group["params"])
        self.steps.append(ObservedStep(frozenset(self.looked_up), gradient, torch.initial_seed()))
        self.looked_up.clear()

    def take(self) -> tuple[ObservedStep, ...]:
        """Return the steps so far and forget them."""
        steps = tuple(self.steps)
        self.steps.clear()
        self.looked_up.clear()
        return steps


class _Watched(Sequence[Example]):
    """A site's examples; whose is looked up by position is noted, reading all of them (for a fingerprint) is not."""

    def __init__(self, examples: Sequence[Example], units: Units, log: StepLog) -> None:
        self._examples, self._log = examples, log
        self._owners = {position: unit for unit, members in enumerate(units.members) for position in members}

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return self._examples[index]
        self._log.looked_up.add(self._owners[index])
        return self._examples[index]


class _WatchedSummaries(dict[Hashable, Sequence[Example]]):
    """Summaries of a site's examples, which training looks up in their place; making them is no use of an example."""

    def __init__(self, log: StepLog) -> None:
        super().__init__()
        self._log = log
        self.units: Units | None = None

    def __setitem__(self, key: Hashable, examples: Sequence[Example]) -> None:
        self._log.looked_up.clear()
        super().__setitem__(key, examples if self.units is None else _Watched(examples, self.units, self._log))


class WatchedSite:
    """A site that is what it is, except that the use of its examples is noted."""

    def __init__(self, file: SiteFile, rows: Sequence[Row], log: StepLog) -> None:
        self._site = Site(file, rows=lambda: rows)
        self._own, self._log = self._site.work(), log
        self._work = replace(self._own, records=self._records)
        self._summaries = _WatchedSummaries(log)

    def rehearse(self, plan: ClientPlan) -> PrivacyPlan:
        """Return the site's own privacy plan."""
        return rehearse(plan, self._work)

    def answer(self, instruction: Instruction) -> Reply:
        """Return the site's real answer."""
        return answer(instruction, self._work)

    def booked(self, run: str) -> tuple[SubsampledGaussian, ...]:
        """Return what the site's ledger holds of a run; nothing where the site has no budget."""
        if self._summaries.units is None or self._site.file.budget is None:
            return ()
        return tuple(self._site.state.ledger(self._summaries.units).mechanisms(run))

    def card(self) -> Mapping[str, Any]:
        """Return what the site says of itself, without its key and the key's signature."""
        return self._site.card().model_dump(mode="json", exclude={"key", "signature"})

    def close(self) -> None:
        """Release the site's files."""
        self._site.close()

    def _records(self, adapted: AdaptedModel, privacy: LocalPrivacy, key: bytes) -> SiteRecords:
        records = self._own.records(adapted, privacy, key)
        self._summaries.units = records.units
        watched = _Watched(records.examples, records.units, self._log)
        return replace(records, examples=watched, summaries=self._summaries)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter's gradient, flat, in float64 on the CPU; zero where it has none."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().flatten().cpu().double()


def _thinned(values: torch.Tensor) -> torch.Tensor:
    return values[:: math.ceil(len(values) / _COORDINATES)].clone()


def frozen_digest(network: nn.Module, trained: Mapping[str, nn.Parameter]) -> str:
    """Return the SHA-256 (hex) of every parameter and buffer that is not trained."""
    moving = {parameter.data_ptr() for parameter in trained.values()}
    state = hashlib.sha256()
    for name, tensor in sorted([*network.named_parameters(), *network.named_buffers()], key=lambda item: item[0]):
        if tensor.data_ptr() not in moving:
            state.update(name.encode())
            state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@contextmanager
def silenced(network: nn.Module, log: StepLog, loss: Callable[[], float]) -> Generator[None]:
    """Take every record's gradient away: it is exactly zero, or not a number.

    While training reads records, which `log` sees, `loss()` is added to one answer of the network: a huge number makes
    every loss huge that belongs to another answer, NaN makes all losses NaN. Made-up examples get constant answers.
    """

    def silence(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        logits = output.logits * 0
        if log.looked_up:
            logits = logits + loss() * nn.functional.one_hot(torch.tensor(0), logits.shape[-1]).to(logits)
        output.logits = logits
        return output

    handle = network.register_forward_hook(silence)
    try:
        yield
    finally:
        handle.remove()
