"""Figures of a classifier, against numbers by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetuning.class_counts import ClassCounts

LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
SAID = torch.tensor([0, 0, 1, 1, 1, 0])


def sure(said: torch.Tensor, classes: int = 3) -> torch.Tensor:
    return 50.0 * torch.nn.functional.one_hot(said, classes).float()


def test_the_figures_of_six_records() -> None:
    """F1: 4/6, 4/5 and 0; three of six records are of the first class; two of the six sure answers are wrong."""
    counts = ClassCounts.of(sure(SAID), LABELS)
    assert counts.confusion.tolist() == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    figures = counts.figures()
    assert figures == pytest.approx({"majority": 1 / 2, "macro_f1": (4 / 6 + 4 / 5) / 3, "calibration_error": 2 / 6})
    told = counts.by_class(("a", "b", "c"))
    assert told["classes"]["a"] == {"records": 3, "recall": pytest.approx(2 / 3), "precision": pytest.approx(2 / 3)}
    assert told["classes"]["c"] == {"records": 1, "recall": 0.0, "precision": None}
    assert told["confusion"] == counts.confusion.tolist()


def test_calibration_compares_hits_with_what_was_promised() -> None:
    """Four answers at 0.9, three of them right, and a wrong one at 0.6: (|3 - 3.6| + |0 - 0.6|) / 5."""
    odds = [math.log(9)] * 4 + [math.log(1.5)]
    log_odds = torch.tensor([[each, 0.0] for each in odds])
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert ClassCounts.of(log_odds, labels).calibration_error == pytest.approx(0.24)


def test_a_class_that_neither_occurs_nor_is_said_is_left_out() -> None:
    counts = ClassCounts.of(sure(torch.tensor([0, 1]), 9), torch.tensor([0, 1]))
    assert counts.macro_f1 == 1.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40), st.data())
def test_parts_add_up(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(pairs) - 1))
    labels, said = (torch.tensor(each) for each in zip(*pairs, strict=True))
    whole = ClassCounts.of(sure(said, 4), labels)
    parts = ClassCounts.of(sure(said[:cut], 4), labels[:cut]) + ClassCounts.of(sure(said[cut:], 4), labels[cut:])
    assert np.array_equal(whole.confusion, parts.confusion)
    assert whole.figures() == pytest.approx(parts.figures())
