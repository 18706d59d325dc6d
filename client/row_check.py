"""Are the rows of a batch of some shape computed, bit by bit, as each is in a batch of its own?

A sum of clipped gradients moves by at most C with one record if every other record's gradient stays what it was. In
floating point that is a matter of kernels: a matrix product of all rows may add up in another order than that of one.
A large adapter, which a server can send, amplifies such a difference without bound. So before a shape is used for the
first time, a batch of made-up rows of that shape is compared with each row alone, bit by bit. In which order a kernel
adds depends on shapes, addresses and threads, never on values: what holds for made-up rows and a made-up adapter holds
for all. The rows are as short and as long as any that are padded so far: a network can also see how long the longest of
a batch really is. Where rows differ, or tell nothing because a gradient is zero or not finite, the units of such a
batch are computed alone (`finetuning.units`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from client.trials import dropout_rates, examples_for, traceless
from finetuning.adapters import AdaptedModel
from finetuning.batches import Batch, Example, collate
from finetuning.padding import BatchShape, shortest_padded_to
from finetuning.tasks.base import TaskObjective

__all__ = ["Computed", "RowCheck", "losses_and_gradients"]

_log = logging.getLogger(__name__)
_NOTHING_DROPPED = 1e-30
PerUnit = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
"""Losses (examples,) and their units to one tensor (units, *parameter shape) per parameter."""
Computed = Callable[[Batch, torch.Tensor], list[torch.Tensor]]
"""A batch and the unit of each row (-1 for a padding row) to all that is computed for it, each (rows, ...)."""


def losses_and_gradients(adapted: AdaptedModel, objective: TaskObjective, per_unit: PerUnit) -> Computed:
    """Return what a training step computes for each row. The losses may be released, so they count too."""

    def computed(batch: Batch, owners: torch.Tensor) -> list[torch.Tensor]:
        adapted.network.train()
        torch.manual_seed(0)
        losses = objective.losses(adapted.network, batch)
        # Copies: a rule may hand out views of what it keeps.
        return [losses.detach().clone(), *(rows.clone() for rows in per_unit(losses * (owners >= 0), owners))]

    return computed


@dataclass(frozen=True, eq=False)
class RowCheck:
    """Answers for one network and one computation; answers are kept beside the network.

    `static`: the shape is that of every batch, so that a row alone is one among padding rows.
    """

    adapted: AdaptedModel
    computed: Computed
    classes: int | None
    static: bool
    longest: int | None
    """Public bound on a record's tokens."""
    key: tuple[object, ...]
    """What else the kernels depend on: the way, the trained parameters, and how the network runs."""
    summaries: bool = False
    """Whether batches hold summaries of their records (`finetuning.summaries`)."""

    def __call__(self, shape: BatchShape) -> bool:
        """Return whether every row of such a batch is computed as it is alone."""
        if shape.rows == 1:
            return True
        key = ("rows", shape, self.summaries, torch.get_num_threads(), *self.key)
        if key not in self.adapted.checked:
            self.adapted.checked[key] = None if self._alike(shape) else f"rows of {shape} differ"
            if self.adapted.checked[key] is not None:
                _log.warning(
                    "the rows of a batch of %d x %d tokens are not computed as each one alone is, on this machine: "
                    "such a batch is computed one by one",
                    shape.rows,
                    shape.length,
                )
        return self.adapted.checked[key] is None

    def _alike(self, shape: BatchShape) -> bool:
        lengths = self._lengths(shape)
        kinds = examples_for(self.adapted, self.classes, lengths, seed=shape.rows, summaries=self.summaries)
        real = shape.rows - 1 if self.static else shape.rows
        with traceless(self.adapted), dropout_rates(self.adapted.network, _NOTHING_DROPPED):
            together = self._rows([kinds[position % len(kinds)] for position in range(real)], shape)
            own = BatchShape(shape.rows if self.static else 1, shape.length, shape.full)
            alone = [self._rows([example], own) for example in kinds]
        telling = all(bool(torch.isfinite(rows).all()) and bool(rows.any()) for rows in together)
        return telling and all(
            torch.equal(rows[position], alone[position % len(kinds)][which][0])
            for which, rows in enumerate(together)
            for position in range(real)
        )

    def _lengths(self, shape: BatchShape) -> list[int]:
        """Return tokens of made-up examples: the longest that such a batch holds, the shortest, and one between."""
        if shape.full:
            return [shape.length] * 3
        longest = max(shape.length - 1, 2)
        shortest = 2 if self.static else min(shortest_padded_to(shape.length, self.longest), longest)
        return [longest, shortest, (longest + shortest + 1) // 2]

    def _rows(self, examples: list[Example], shape: BatchShape) -> list[torch.Tensor]:
        base = self.adapted.base
        batch = collate(examples, base.pad_token_id, rows=shape.rows, length=shape.length, full=shape.full)
        owners = torch.arange(shape.rows, device=base.device)
        owners[len(examples) :] = -1
        return self.computed(batch.to(base.device), owners)
