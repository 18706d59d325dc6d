"""From the units of a step to padded micro-batches that say which row belongs to whom.

A unit is what privacy protects as one: a record, or all records of a user. Its records must meet in one micro-batch,
because its gradient is clipped as a whole. Its padded length follows from its own records, and it meets units of that
padded length alone: so how units are grouped into micro-batches changes no number, not even by rounding, wherever
`alike` says that the rows of a shape are computed as each one alone is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from finetuning.batches import Batch, Example, collate
from finetuning.padding import BatchShape, padded_length, padded_rows

__all__ = ["MicroBatch", "MicroBatches"]


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A padded batch; its first `records` rows are records, sorted by unit, and the others are padding rows.

    =========  ======  ========  ==========================================================
    owners     [B]     int64     the row's unit within this micro-batch; -1 for padding rows
    weights    [B]     float32   what the row's loss counts in its unit's
    =========  ======  ========  ==========================================================

    `positions` says which of the site's examples the records are.
    """

    batch: Batch
    owners: torch.Tensor
    weights: torch.Tensor
    positions: tuple[int, ...]

    @property
    def records(self) -> int:
        """How many rows are records."""
        return len(self.positions)

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the same micro-batch on another device."""
        return replace(
            self, batch=self.batch.to(device), owners=self.owners.to(device), weights=self.weights.to(device)
        )


_Unit = Sequence[int]


def _always(shape: BatchShape) -> bool:
    return True


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """Makes the micro-batches of a step; `static` is the shape of all of them, or None where it follows from the units.

    A static shape follows from public bounds, whatever the site holds and whatever was drawn.
    """

    examples: Sequence[Example]
    units: Sequence[_Unit]
    pad_token_id: int
    max_tokens: int
    max_units: int | None
    mean: bool
    longest: int | None
    static: BatchShape | None
    alike: Callable[[BatchShape], bool]

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        units: Sequence[_Unit] | None,
        pad_token_id: int,
        *,
        max_tokens: int,
        max_units: int | None = None,
        mean: bool = True,
        longest: int | None = None,
        static_shapes: bool = False,
        most_records: int = 1,
        alike: Callable[[BatchShape], bool] = _always,
    ) -> MicroBatches:
        """Return the maker for a site's records.

        Args:
            examples: the site's records.
            units: positions of each unit's records; None: each record is a unit.
            pad_token_id: fills the padding.
            max_tokens: bound on padded tokens per micro-batch; a larger unit has one to itself.
            max_units: bound on units per micro-batch, or None.
            mean: a unit's loss is the mean over its records, else the sum.
            longest: public bound on a record's tokens, which padding does not exceed; None: there is none.
            static_shapes: every micro-batch has the same shape; needs `longest`.
            most_records: public bound on a unit's records, for static shapes.
            alike: whether the rows of a batch of this shape are computed, bit by bit, as each is in a batch of its own;
                where they are not, a unit is computed alone.

        Raises:
            ValueError: static shapes without `longest`.
        """
        units = units if units is not None else [(position,) for position in range(len(examples))]
        static = None
        if static_shapes:
            if longest is None:
                raise ValueError("static shapes need a public bound on a record's length; give longest")
            length = padded_length(longest, longest)
            # One padding row at least, where units meet: a batch without padding would be computed without a mask.
            spare = 0 if max_units == 1 else 1
            fitting = max_tokens // length - spare
            rows = max(fitting if max_units is None else min(fitting, max_units), most_records)
            static = BatchShape(rows + spare, length, full=False)
        return cls(examples, units, pad_token_id, max_tokens, max_units, mean, longest, static, alike)

    def of_step(self, drawn: Sequence[int]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of the drawn units; none for an empty draw. A unit without records is left out."""
        units = [unit for position in drawn if (unit := self.units[position])]
        for (length, full), alike in groupby(sorted(units, key=self._padding), key=self._padding):
            for group in self._groups(list(alike), length, full):
                yield self._padded(group, self._shape(group, length, full))

    def _padding(self, unit: _Unit) -> tuple[int, bool]:
        """Return the length that a unit's records are padded to, and whether that pads none of them."""
        if self.static:
            return self.static.length, False
        lengths = [len(self.examples[position]) for position in unit]
        alone = self.max_units == 1  # A batch of its own needs no padding.
        length = max(lengths) if alone else padded_length(max(lengths), self.longest)
        return length, min(lengths) == length

    def _groups(self, units: Sequence[_Unit], length: int, full: bool) -> Iterator[list[_Unit]]:
        """Yield the units that are computed together."""
        group: list[_Unit] = []
        for unit in units:
            if not self.alike(self._shape([unit], length, full)):
                yield [unit]  # Always alone: a unit whose records are several may need more than its own rows.
                continue
            if group and not self._may_join([*group, unit], length, full):
                yield from self._checked(group, length, full)
                group = []
            group.append(unit)
        if group:
            yield from self._checked(group, length, full)

    def _may_join(self, group: Sequence[_Unit], length: int, full: bool) -> bool:
        if self.max_units is not None and len(group) > self.max_units:
            return False
        rows = sum(len(unit) for unit in group)
        return rows < self.static.rows if self.static else rows * length <= self.max_tokens

    def _checked(self, group: list[_Unit], length: int, full: bool) -> Iterator[list[_Unit]]:
        if self.alike(self._shape(group, length, full)):
            yield group
        else:
            yield from ([unit] for unit in group)

    def _shape(self, group: Sequence[_Unit], length: int, full: bool) -> BatchShape:
        """Return the shape of a batch of these units: a few padding rows more, where they still fit."""
        if self.static:
            return self.static
        rows = sum(len(unit) for unit in group)
        more = padded_rows(rows) if len(group) > 1 else rows
        if self.max_units is not None:
            more = min(more, max(rows, self.max_units))  # a padding row's gradient takes memory too
        return BatchShape(more if more * length <= self.max_tokens else rows, length, full)

    def _padded(self, units: Sequence[_Unit], shape: BatchShape) -> MicroBatch:
        records = [(position, owner) for owner, unit in enumerate(units) for position in unit]
        examples = [self.examples[position] for position, _ in records]
        batch = collate(examples, self.pad_token_id, rows=shape.rows, length=shape.length, full=shape.full)
        padding = batch.size - len(records)
        weights = [1 / len(units[owner]) if self.mean else 1.0 for _, owner in records]
        return MicroBatch(
            batch,
            owners=torch.tensor([owner for _, owner in records] + [-1] * padding),
            weights=torch.tensor(weights + [0.0] * padding),
            positions=tuple(position for position, _ in records),
        )
