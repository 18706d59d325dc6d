"""From the units of a step to padded micro-batches that say which row belongs to whom.

A unit is what privacy protects as one: a record, or all records of a user. Its records must meet in one micro-batch,
because its gradient is clipped as a whole. How units are grouped into micro-batches changes no number: sums of clipped
gradients add up in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from finetuning.batches import Batch, Example, collate, micro_batches

__all__ = ["MicroBatch", "MicroBatches"]


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A padded batch; its first `records` rows are records, sorted by unit, and the others are padding.

    =========  ======  ========  ==========================================================
    owners     [B]     int64     the row's unit within this micro-batch; -1 for padding rows
    weights    [B]     float32   what the row's loss counts in its unit's
    =========  ======  ========  ==========================================================
    """

    batch: Batch
    owners: torch.Tensor
    weights: torch.Tensor
    records: int

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the same micro-batch on another device."""
        return replace(
            self, batch=self.batch.to(device), owners=self.owners.to(device), weights=self.weights.to(device)
        )


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """Makes the micro-batches of a step; `shape` (rows, length) is that of all of them, or None where each has its own.

    A static shape is that of the site's longest record and largest unit, whatever was drawn.
    """

    examples: Sequence[Example]
    units: Sequence[Sequence[int]]
    pad_token_id: int
    max_tokens: int
    max_units: int | None
    mean: bool
    shape: tuple[int, int] | None

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        units: Sequence[Sequence[int]] | None,
        pad_token_id: int,
        *,
        max_tokens: int,
        max_units: int | None = None,
        mean: bool = True,
        static_shapes: bool = False,
    ) -> MicroBatches:
        """Return the maker for a site's records.

        Args:
            examples: the site's records.
            units: positions of each unit's records; None: each record is a unit.
            pad_token_id: fills the padding.
            max_tokens: bound on padded tokens per micro-batch; a larger unit has one to itself.
            max_units: bound on units per micro-batch, or None.
            mean: a unit's loss is the mean over its records, else the sum.
            static_shapes: every micro-batch has the same shape.
        """
        units = units if units is not None else [(position,) for position in range(len(examples))]
        shape = None
        if static_shapes and examples:
            length = max(len(example) for example in examples)
            largest = max((len(unit) for unit in units), default=1)
            fitting = max_tokens // length
            rows = max(fitting if max_units is None else min(fitting, max_units), largest)
            shape, max_tokens = (rows, length), rows * length
        return cls(examples, units, pad_token_id, max_tokens, max_units, mean, shape)

    def of_step(self, drawn: Sequence[int]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of the drawn units; none for an empty draw. A unit without records is left out."""
        units = [unit for position in drawn if (unit := self.units[position])]
        lengths = [self.shape[1] if self.shape else max(len(self.examples[at]) for at in unit) for unit in units]
        for group in micro_batches(lengths, max_tokens=self.max_tokens, rows=[len(unit) for unit in units]):
            step = self.max_units or len(group)
            for start in range(0, len(group), step):
                yield self._padded([units[position] for position in group[start : start + step]])

    def _padded(self, units: Sequence[Sequence[int]]) -> MicroBatch:
        records = [(self.examples[position], owner) for owner, unit in enumerate(units) for position in unit]
        rows, length = self.shape or (len(records), None)
        batch = collate([example for example, _ in records], self.pad_token_id, rows=rows, length=length)
        padding = batch.size - len(records)
        weights = [1 / len(units[owner]) if self.mean else 1.0 for _, owner in records]
        return MicroBatch(
            batch,
            owners=torch.tensor([owner for _, owner in records] + [-1] * padding),
            weights=torch.tensor(weights + [0.0] * padding),
            records=len(records),
        )
