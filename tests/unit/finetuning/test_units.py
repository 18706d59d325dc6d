"""Which record is in which row of which micro-batch, and whose it is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.batches import IGNORED, Example, collate, micro_batches
from finetuning.padding import BatchShape, padded_length, padded_rows
from finetuning.units import MicroBatches

PAD = 9


def example(number: int, length: int) -> Example:
    """Return an example that can be told from its first token."""
    return Example(np.full(length, 100 + number, dtype=np.int32), np.ones(length, dtype=np.bool_))


def numbers(part: torch.Tensor) -> list[int]:
    return (part[:, 0] - 100).tolist()


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=4), min_size=1, max_size=8),
    max_tokens=st.integers(1, 60),
    max_units=st.sampled_from([None, 1, 2]),
    static_shapes=st.booleans(),
    data=st.data(),
)
def test_every_record_of_a_drawn_unit_is_in_one_micro_batch_once(
    sizes: list[list[int]], max_tokens: int, max_units: int | None, static_shapes: bool, data: st.DataObject
) -> None:
    examples = [example(number, length) for number, length in enumerate(length for unit in sizes for length in unit)]
    starts = np.cumsum([0, *map(len, sizes)])
    units = [tuple(range(start, start + len(unit))) for start, unit in zip(starts, sizes, strict=False)]
    refused = data.draw(st.sets(st.integers(1, 40)))
    maker = MicroBatches.of(
        examples,
        units,
        PAD,
        max_tokens=max_tokens,
        max_units=max_units,
        static_shapes=static_shapes,
        longest=9,
        most_records=4,
        alike=lambda shape: shape.rows == 1 or shape.rows not in refused,
    )
    drawn = data.draw(st.lists(st.sampled_from(range(len(units))), unique=True))
    met: list[tuple[int, ...]] = []
    shapes: set[tuple[int, ...]] = set()
    for part in maker.of_step(drawn):
        rows = numbers(part.batch.input_ids[: part.records])
        owners = part.owners[: part.records].tolist()
        shapes.add(tuple(part.batch.input_ids.shape))
        hidden = part.batch.attention_mask.sum(1) < part.batch.input_ids.shape[1]
        assert len(set(hidden.tolist())) == 1 or hidden.any()
        groups = [
            tuple(row for row, owner in zip(rows, owners, strict=True) if owner == of) for of in sorted({*owners})
        ]
        met += groups
        assert sorted({*owners}) == list(range(len(groups)))
        assert max_units is None or len(groups) <= max_units
        assert len(groups) == 1 or static_shapes or part.batch.input_ids.numel() <= max_tokens
        weights = [1 / len(groups[owner]) for owner in owners]
        assert part.weights.tolist() == pytest.approx(weights + [0.0] * (part.batch.size - part.records))
        assert (part.owners[part.records :] == -1).all()
        assert (part.batch.targets[part.records :] == IGNORED).all()
        assert (part.batch.attention_mask.sum(1) > 0).all()
    assert sorted(met) == sorted(units[position] for position in drawn if units[position])
    assert not static_shapes or len(shapes) <= 1


def test_a_static_shape_does_not_depend_on_the_draw() -> None:
    maker = MicroBatches.of(
        [example(number, length) for number, length in enumerate((2, 7, 3, 4))],
        None,
        PAD,
        max_tokens=32,
        static_shapes=True,
        longest=8,
    )
    shapes = [tuple(p.batch.input_ids.shape) for drawn in ([0], [2, 3], [0, 1, 2, 3]) for p in maker.of_step(drawn)]
    assert shapes == [(4, 8)] * 4
    assert list(maker.of_step([])) == []


def test_what_a_record_is_padded_with_does_not_depend_on_the_others() -> None:
    """Its length and whether it is masked follow from its own tokens, whoever is drawn beside it."""
    examples = [example(number, length) for number, length in enumerate((3, 16, 15, 16, 40, 33, 48, 100))]
    maker = MicroBatches.of(examples, None, PAD, max_tokens=4096, longest=100)

    def seen(drawn: list[int]) -> dict[int, tuple[int, bool]]:
        return {
            number: (part.batch.input_ids.shape[1], bool(part.batch.attention_mask.all()))
            for part in maker.of_step(drawn)
            for number in numbers(part.batch.input_ids[: part.records])
        }

    together = seen(list(range(8)))
    assert together == {number: seen([number])[number] for number in range(8)}
    assert together == {
        0: (16, False), 1: (16, True), 2: (16, False), 3: (16, True), 4: (48, False), 5: (48, False), 6: (48, True),
        7: (100, True),
    }  # fmt: skip


def test_units_whose_shape_is_not_alike_are_alone() -> None:
    examples = [example(number, 5) for number in range(6)]
    shapes: list[BatchShape] = []

    def alike(shape: BatchShape) -> bool:
        shapes.append(shape)
        return shape.rows in (1, 2)

    maker = MicroBatches.of(examples, [(0, 1), (2,), (3, 4, 5)], PAD, max_tokens=4096, alike=alike)
    parts = [numbers(part.batch.input_ids[: part.records]) for part in maker.of_step([0, 1, 2])]
    assert sorted(parts) == [[0, 1], [2], [3, 4, 5]]
    assert set(shapes) == {BatchShape(rows, 16, full=False) for rows in (1, 2, 3)}


def test_static_shapes_need_a_bound() -> None:
    with pytest.raises(ValueError, match="public bound"):
        MicroBatches.of([example(0, 5)], None, PAD, max_tokens=64, static_shapes=True)


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_padding_is_at_most_an_eighth_and_grows_with_the_length(one: int, other: int) -> None:
    for value, padded in ((one, padded_length(one)), (one, padded_rows(one))):
        assert value <= padded <= max(value * 9 / 8 + 1, -(-value // 16) * 16)
    assert (one <= other) <= (padded_length(one) <= padded_length(other))
    assert padded_length(one, other) == max(one, min(padded_length(one), other))
    assert padded_length(padded_length(one)) == padded_length(one)


def test_without_units_each_record_is_one_and_sums_count_fully() -> None:
    maker = MicroBatches.of([example(0, 2), example(1, 2)], None, PAD, max_tokens=99, mean=False)
    assert maker.units == [(0,), (1,)]
    grouped = MicroBatches.of(maker.examples, [(0, 1)], PAD, max_tokens=99, mean=False)
    (part,) = grouped.of_step([0])
    assert (part.owners.tolist(), part.weights.tolist()) == ([0, 0], [1.0, 1.0])
    moved = part.to("meta")
    assert {moved.owners.device.type, moved.weights.device.type, moved.batch.input_ids.device.type} == {"meta"}


def test_collate_pads_rows_and_tokens() -> None:
    labelled = Example(np.array([5, 6], dtype=np.int32), np.zeros(2, dtype=np.bool_), 3)
    batch = collate([labelled], PAD, rows=2, length=3)
    assert batch.input_ids.tolist() == [[5, 6, PAD], [5, 6, PAD]]
    assert batch.targets.tolist() == [[IGNORED] * 3] * 2
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 0, 0]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [3, 0]


def test_rows_of_an_item_stay_together() -> None:
    assert micro_batches([5, 1, 4, 9], max_tokens=30, rows=[2, 6, 1, 1]) == [[1, 2], [0, 3]]
