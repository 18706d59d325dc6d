"""How far a record is padded, and how many rows a micro-batch has: shapes that follow from the record's own length.

A padded length that followed from the longest record of the batch would let one record change every other one's
gradient: by rounding at least, which a large adapter amplifies without bound, and by more where a model switches
something on by length. So a record's padded length is a function of its own length, and it is computed in a batch with
records of that padded length alone (docs/decisions/0016).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LONGEST_TRIED", "BatchShape", "padded_length", "padded_rows", "shortest_padded_to"]

LONGEST_TRIED = 2048
"""Tokens. Networks are tried with records as long as any may be; a longer bound than this has to be asked for, by
`data.max_length`, since a trial at a modern model's whole context takes minutes on a CPU."""

_STEP = 16
"""Tokens; a multiple keeps every row of a batch at an address that vector instructions treat alike."""
_STEPS_PER_OCTAVE = 8


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The shape of a padded batch, and whether it is `full`: no row has any padding.

    Where nothing is padded, attention is computed without a mask, by other kernels: full rows have batches of their
    own.
    """

    rows: int
    length: int
    full: bool


def padded_length(tokens: int, most: int | None = None) -> int:
    """Return the length that a record of `tokens` tokens is padded to: a multiple of 16, at most an eighth more.

    (Up to 128 tokens the next multiple of 16.) `most`, the model's context, is never exceeded by padding.

    >>> [padded_length(tokens) for tokens in (1, 16, 17, 128, 129, 257, 1000)]
    [16, 16, 32, 128, 144, 288, 1024]
    >>> padded_length(97, most=100), padded_length(100, most=100)
    (100, 100)
    """
    step = max(_STEP, (1 << (tokens - 1).bit_length()) // (2 * _STEPS_PER_OCTAVE))
    length = -(-tokens // step) * step
    return length if most is None else max(tokens, min(length, most))


def shortest_padded_to(length: int, most: int | None = None) -> int:
    """Return the fewest tokens, two at least, that are padded to `length`.

    >>> shortest_padded_to(16), shortest_padded_to(48), shortest_padded_to(1024), shortest_padded_to(100, most=100)
    (2, 33, 961, 97)
    """
    shortest = length
    while shortest > 2 and padded_length(shortest - 1, most) == length:
        shortest -= 1
    return shortest


def padded_rows(rows: int) -> int:
    """Return how many rows a batch of `rows` records has: at most an eighth more, so that there are few shapes.

    >>> [padded_rows(rows) for rows in (1, 7, 16, 17, 31, 33, 100)]
    [1, 7, 16, 18, 32, 36, 104]
    """
    step = max(1, (1 << (rows - 1).bit_length()) // (2 * _STEPS_PER_OCTAVE))
    return -(-rows // step) * step
