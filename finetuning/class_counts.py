"""What a classifier said of labelled records: counts from which every usual figure follows, and which add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["ClassCounts"]

_BINS = 15
"""Of confidence, equally wide, as Guo et al. 2017 (arXiv 1706.04599) use."""


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Counts over records.

    ===========  ===================  ==========================================================================
    confusion    [classes, classes]   records of a class (row) of which a class (column) was said
    confidence   [bins, 3]            by the probability of what was said: records, sum of probabilities, hits
    ===========  ===================  ==========================================================================
    """

    confusion: NDArray[np.int64]
    confidence: NDArray[np.float64]

    @classmethod
    def of(cls, log_odds: torch.Tensor, labels: torch.Tensor) -> ClassCounts:
        """Return the counts of a batch: logits of shape (records, classes), and their labels."""
        sure, said = (each.cpu().numpy() for each in log_odds.double().softmax(dim=1).max(dim=1))
        truth, classes = labels.cpu().numpy(), log_odds.shape[1]
        confusion = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(confusion, (truth, said), 1)
        confidence = np.zeros((_BINS, 3))
        bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
        np.add.at(confidence, bins, np.stack([np.ones_like(sure), sure, said == truth], axis=1))
        return cls(confusion, confidence)

    def __add__(self, other: ClassCounts) -> ClassCounts:
        return ClassCounts(self.confusion + other.confusion, self.confidence + other.confidence)

    @property
    def majority(self) -> float:
        """The accuracy of always saying the class that most of these records have."""
        return _ratio(self.confusion.sum(axis=1).max(), self.confusion.sum())

    @property
    def macro_f1(self) -> float:
        """The mean of the classes' F1, 2 hits / (records of the class + records that it was said of); a class that
        neither occurs nor is said is left out."""
        hits, ends = self.confusion.diagonal(), self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        found = ends > 0
        return float((2 * hits[found] / ends[found]).mean()) if found.any() else float("nan")

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: |hits - sum of probabilities| over the bins, per record."""
        records, probabilities, hits = self.confidence.sum(axis=0)[0], self.confidence[:, 1], self.confidence[:, 2]
        return _ratio(np.abs(hits - probabilities).sum(), records)

    def figures(self) -> dict[str, float]:
        """Return what one number each says."""
        return {
            "majority": self.majority,
            "macro_f1": self.macro_f1,
            "calibration_error": self.calibration_error,
        }

    def by_class(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return each label's records, recall and precision, and the confusion matrix; a ratio of nothing is None."""
        hits, occurs, said = self.confusion.diagonal(), self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        return {
            "classes": {
                label: {
                    "records": int(occurs[index]),
                    "recall": float(hits[index] / occurs[index]) if occurs[index] else None,
                    "precision": float(hits[index] / said[index]) if said[index] else None,
                }
                for index, label in enumerate(labels)
            },
            "confusion": self.confusion.tolist(),
        }


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else float("nan")
