"""Rows to token ids with a mask of what is learned, and token ids to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from conf.schema.data import ChatColumns, Columns, DataConfig, LabelledColumns
from finetuning.datasets import check_columns
from finetuning.labels import read_labels
from finetuning.prompts import Segment, TrainOn, segments
from finetuning.rows import Place, Row, at_place, named, place_of
from finetuning.special_tokens import NO_SPECIALS, SpecialTokens
from finetuning.special_tokens import special_tokens as known_specials
from finetuning.tokenization_report import TokenizationReport, counted
from finetuning.tokenizing import SpecialsInText, sequence_bound, tokenize_segments
from protocol.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "Batch",
    "Example",
    "TokenizationReport",
    "TokenizedRows",
    "collate",
    "framed",
    "micro_batches",
    "tokenize_as_configured",
    "tokenize_rows",
]

IGNORED = -100
"""Target of a token that is not learned: the value that torch's cross entropy leaves out."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenized record, as arrays of equal length; `label` is a class index, or None for a language model.

    `summary`, shape (hidden,), is what a frozen network makes of the record where only a head on it is trained; then
    nobody reads the tokens again (`finetuning.summaries`).
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    label: int | None = None
    summary: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class TokenizedRows:
    """The examples, in the order of their rows, and what happened on the way."""

    examples: tuple[Example, ...]
    report: TokenizationReport

    @classmethod
    def joined(cls, parts: Sequence[TokenizedRows]) -> TokenizedRows:
        """Return several parts, at least one and tokenized alike, as one."""
        reports = [part.report for part in parts]
        starts = accumulate((report.rows for report in reports), initial=0)
        report = TokenizationReport(
            rows=sum(report.rows for report in reports),
            kept=sum(report.kept for report in reports),
            truncated=sum(report.truncated for report in reports),
            emptied=tuple(start + at for start, report in zip(starts, reports, strict=False) for at in report.emptied),
            emptied_at=tuple(place for report in reports for place in report.emptied_at),
            tokens=sum(report.tokens for report in reports),
            trained_tokens=sum(report.trained_tokens for report in reports),
            max_length=reports[0].max_length,
            merged=sum(report.merged for report in reports),
            specials=sum(report.specials for report in reports),
            rows_with_specials=sum(report.rows_with_specials for report in reports),
            special_tokens=reports[0].special_tokens,
        )
        return cls(tuple(example for part in parts for example in part.examples), report)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Padded tensors of `size` examples.

    ============== ======== ======= ============================================================
    input_ids      [B, T]   int64   padded on the right
    attention_mask [B, T]   int64   1 for tokens, 0 for padding
    targets        [B, T]   int64   the token ids where learned, else -100; NOT shifted
    labels         [B]      int64   class indices, or None for a language model
    summaries      [B, H]   float32 of a frozen network, or None where it reads the tokens
    ============== ======== ======= ============================================================
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor | None = None
    summaries: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Number of examples; 0 for an empty Poisson draw."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            targets=self.targets.to(device),
            labels=None if self.labels is None else self.labels.to(device),
            summaries=None if self.summaries is None else self.summaries.to(device),
        )


def tokenize_as_configured(
    rows: Sequence[Row],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None,
    labels: tuple[str, ...] | None,
) -> TokenizedRows:
    """Return what `tokenize_rows` makes of rows under a data configuration and a model's `context` (tokens).

    Raises:
        DataError: as `tokenize_rows` does.
    """
    return tokenize_rows(
        rows,
        data.columns,
        tokenizer,
        max_length=sequence_bound(data.max_length, tokenizer, context),
        train_on=data.train_on,
        truncation=data.truncation,
        special_tokens=data.special_tokens,
        labels=labels,
    )


def tokenize_rows(
    rows: Sequence[Row],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    train_on: TrainOn = "completion",
    truncation: Literal["truncate", "refuse"] = "truncate",
    special_tokens: SpecialsInText = "text",
    labels: tuple[str, ...] | None = None,
) -> TokenizedRows:
    """Return one example per row that has something to learn, and a report on all rows.

    A bos token comes first where the tokenizer has one, and a learned eos token last; a chat has only what its template
    writes. A labelled text gets the tokenizer's cls and sep tokens where it has them. Truncation keeps the start;
    `max_length=None` stands for the length that the tokenizer states. `special_tokens` says what the letters of a
    special token are inside a record (`data.special_tokens`). No rows give no examples.

    Raises:
        DataError: naming the row, for a missing column, a value that is no text, an unknown label, a sequence that is
            too long under `truncation="refuse"`; or when no row has anything to learn.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length} must be at least 2: one token to read and one to learn")
    if rows:
        check_columns(rows, columns)
    bound = sequence_bound(max_length, tokenizer, context=None)
    framing = _framing(columns, tokenizer)
    specials = known_specials(tokenizer) if special_tokens == "text" else NO_SPECIALS
    pieces = [
        _numbered(number, row, columns, tokenizer, train_on, specials) for number, row in enumerate(rows, start=1)
    ]
    places = [place_of(row, number) for number, row in enumerate(rows, start=1)]
    texts = tokenize_segments(pieces, tokenizer, special_tokens, places)
    label_of: list[int | None] = [None] * len(rows)
    if isinstance(columns, LabelledColumns):
        label_of[:] = read_labels(rows, columns.label, labels)
    examples: list[Example] = []
    emptied: list[int] = []
    truncated = 0
    for number, text in enumerate(texts, start=1):
        ids, trained = text.ids, text.trained
        is_labelled = label_of[number - 1] is not None
        length = len(ids) + framing.length if len(ids) else 0
        if bound is not None and length > bound:
            _check_may_cut(places[number - 1], length, bound, truncation)
            truncated += 1
        has_content = bool(ids) if is_labelled else any(trained)
        example = framing.example(ids, trained, label_of[number - 1], bound) if has_content else None
        if example is None or not (is_labelled or example.trained.any()):
            emptied.append(number)
            continue
        examples.append(example)
    emptied_at = tuple(places[number - 1] for number in emptied)
    if rows and not examples:
        raise DataError(_nothing_left(emptied_at, truncated, bound))
    report = TokenizationReport(
        rows=len(rows),
        kept=len(examples),
        truncated=truncated,
        emptied=tuple(emptied),
        emptied_at=emptied_at,
        tokens=sum(len(example) for example in examples),
        trained_tokens=sum(int(example.trained.sum()) for example in examples),
        max_length=bound,
        merged=sum(text.is_merged for text in texts),
        specials=sum(text.specials for text in texts),
        rows_with_specials=sum(text.specials > 0 for text in texts),
        special_tokens=special_tokens,
    )
    return TokenizedRows(tuple(examples), report)


def collate(
    examples: Sequence[Example],
    pad_token_id: int,
    *,
    rows: int | None = None,
    length: int | None = None,
    full: bool = False,
) -> Batch:
    """Return the examples padded on the right, one row each; none at all gives a batch of shape [0, 0].

    A row holds one example. Several packed into a row could not be clipped apart: their gradients would share a row.

    Args:
        examples: what to learn.
        pad_token_id: fills the padding.
        rows: pads to so many rows. A padding row has nothing to learn, and one visible token, so that no attention is
            over nothing; its loss belongs to no example. Its tokens are the first example's: some classifiers look for
            the end of a text in every row.
        length: pads to so many tokens; None: to the longest example.
        full: padding rows are visible from end to end, as all examples are then: no row has any padding.
    """
    longest = length or max((len(example) for example in examples), default=0)
    shape = (rows or len(examples), longest)
    ids = np.full(shape, pad_token_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    mask[len(examples) :, : longest if full else 1] = 1
    targets = np.full(shape, IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        used = len(example)
        ids[row, :used] = example.input_ids
        mask[row, :used] = 1
        targets[row, :used] = np.where(example.trained, example.input_ids, IGNORED)
    ids[len(examples) :] = ids[:1]
    known = [example.label for example in examples if example.label is not None]
    if known and len(known) != len(examples):
        raise ValueError(f"{len(known)} of {len(examples)} examples have a label; a batch needs all or none")
    labels = known + [0] * (shape[0] - len(examples))
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        targets=torch.from_numpy(targets),
        labels=torch.tensor(labels, dtype=torch.int64) if known else None,
        summaries=_summaries(examples, shape[0]),
    )


def _summaries(examples: Sequence[Example], rows: int) -> torch.Tensor | None:
    known = [example.summary for example in examples if example.summary is not None]
    if not known:
        return None
    return torch.from_numpy(np.stack([*known, *([known[0]] * (rows - len(known)))]))


def micro_batches(lengths: Sequence[int], *, max_tokens: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """Return groups of positions such that longest length times rows stays within `max_tokens`.

    Sorting by length keeps padding small. Each position is in exactly one group; one that is longer than `max_tokens`
    has a group to itself. Equal lengths keep their order, so the result depends on the arguments alone.

    Args:
        lengths: tokens of each item; the longest row's where an item has several.
        max_tokens: bound on the padded tokens of a group.
        rows: rows of each item, which stay together; None: one each.

    >>> micro_batches([5, 1, 4, 9], max_tokens=7)
    [[1], [2], [0], [3]]
    >>> micro_batches([5, 1, 4, 9], max_tokens=10)
    [[1, 2], [0], [3]]
    >>> micro_batches([5, 1, 4, 9], max_tokens=30, rows=[2, 6, 1, 1])
    [[1, 2], [0, 3]]
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    rows = rows or [1] * len(lengths)
    groups: list[list[int]] = []
    filled = 0
    for position in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        # Ascending order: the newcomer is the longest of its group.
        filled += rows[position]
        if groups and lengths[position] * filled <= max_tokens:
            groups[-1].append(position)
        else:
            groups.append([position])
            filled = rows[position]
    return groups


@dataclass(frozen=True, slots=True)
class _Framing:
    """The special tokens around a row. A final token that closes the input (`keep_end`) survives truncation."""

    start: tuple[int, ...]
    end: tuple[int, ...]
    end_trained: bool
    keep_end: bool

    @property
    def length(self) -> int:
        return len(self.start) + len(self.end)

    def example(self, ids: list[int], trained: list[bool], label: int | None, bound: int | None) -> Example:
        if self.keep_end and bound is not None:
            room = max(bound - self.length, 1)
            ids, trained = ids[:room], trained[:room]
        cut = slice(0, bound)
        all_ids = np.array([*self.start, *ids, *self.end][cut], dtype=np.int32)
        ends = [self.end_trained] * len(self.end)
        return Example(all_ids, np.array([*([False] * len(self.start)), *trained, *ends][cut], dtype=np.bool_), label)


def _framing(columns: Columns, tokenizer: PreTrainedTokenizerBase) -> _Framing:
    if isinstance(columns, ChatColumns):
        return _Framing((), (), end_trained=False, keep_end=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if isinstance(columns, LabelledColumns):
        return _Framing(*_class_frame(tokenizer), end_trained=False, keep_end=True)
    return _Framing(_ids(bos), _ids(eos), end_trained=True, keep_end=False)


def _class_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what stands before and after a text to be classified."""
    cls = tokenizer.cls_token_id
    return _ids(cls if cls is not None else tokenizer.bos_token_id), _ids(tokenizer.sep_token_id)


def framed(ids: NDArray[np.int32], tokenizer: PreTrainedTokenizerBase, classified: bool) -> NDArray[np.int32]:
    """Return made-up ids whose first and last ones are those of a text to be classified; as they are, where it is none.

    Some classifiers count their special tokens: BART's reads the state at the end of the text.
    """
    start, end = _class_frame(tokenizer) if classified else ((), ())
    inner = ids[len(start) : max(len(ids) - len(end), len(start))]
    return np.array([*start, *inner, *end], dtype=np.int32)[: len(ids)]


def _ids(token: object) -> tuple[int, ...]:
    return (token,) if isinstance(token, int) else ()


def _numbered(
    number: int,
    row: Row,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    train_on: TrainOn,
    specials: SpecialTokens,
) -> tuple[Segment, ...]:
    with at_place(place_of(row, number)):
        return segments(row, columns, tokenizer, train_on, specials)


def _check_may_cut(place: Place, length: int, bound: int, truncation: str) -> None:
    if truncation == "refuse":
        raise DataError(
            f"{place}: {length} tokens are more than data.max_length={bound}; shorten the row, "
            "raise data.max_length up to the model's context, or set data.truncation=truncate"
        )


def _nothing_left(places: Sequence[Place], truncated: int, bound: int | None) -> str:
    cut = f"; {truncated} were cut to data.max_length={bound}: raise it" if truncated else ""
    known = f" ({named(places)})" if any(place.source for place in places) else ""
    return (
        f"none of {counted(len(places), 'row')} has anything to learn: texts or completions are empty{cut}; check "
        f"data.columns, or leave the records out{known}"
    )
