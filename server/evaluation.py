"""What the server measures: held-out records that it may see, in groups (one per site in a simulation)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

from conf.schema.experiment import Experiment
from finetuning.adapters import AdaptedModel, attach
from finetuning.batches import Example, tokenize_as_configured
from finetuning.datasets import read_rows, split_rows
from finetuning.evaluation import evaluate, evaluate_groups
from finetuning.models import load_base
from finetuning.rows import Row, at_place
from finetuning.summaries import reads_summaries, summarized
from finetuning.tasks.base import Quality, TaskObjective
from finetuning.tasks.build import build_objective
from finetuning.vocabulary import check_fits
from protocol.tensors import NamedTensors
from server.events import Evaluated, PersonalEvaluated
from server.root import split_root

__all__ = ["Evaluator", "build_evaluator"]

_ALL = "all"
"""The one group of records that are not split by site."""


class Evaluator:
    """The server's own copy of the base, and its held-out examples."""

    def __init__(
        self,
        adapted: AdaptedModel,
        groups: Mapping[str, Sequence[Example]],
        objective: TaskObjective,
        micro_batch_tokens: int,
        root: Sequence[Example] = (),
        *,
        labels: Sequence[str] | None = None,
        text_bytes: Mapping[str, int] | None = None,
    ) -> None:
        """Hold what is evaluated.

        Args:
            adapted: the network.
            groups: held-out examples.
            objective: what is measured.
            micro_batch_tokens: padded tokens per forward pass.
            root: public examples that the server trains on itself.
            labels: of a classifier.
            text_bytes: of a language model: the bytes of UTF-8 that each group's predicted tokens stand for.
        """
        self._labels = labels
        self._text_bytes = text_bytes or {}
        self.root = root
        """Public examples that the server trains on itself, and does not evaluate on; empty unless a rule asks."""
        self._adapted = adapted
        self._objective = objective
        self._micro_batch_tokens = micro_batch_tokens
        self._groups = groups

    @property
    def base_digest(self) -> str:
        """The digest of the server's base."""
        return self._adapted.base.digest

    @property
    def adapted(self) -> AdaptedModel:
        """The network with its adapter attached."""
        return self._adapted

    def initial_adapter(self, seed: int) -> NamedTensors:
        """Return the adapter that training starts from."""
        return self._adapted.initial(seed)

    def evaluate(self, adapter: NamedTensors, round_number: int, *, by_class: bool = False) -> Evaluated | None:
        """Return the quality of an adapter, also class by class if asked; None without held-out examples."""
        if not self._groups:
            return None
        self._adapted.load(adapter)
        total, parts = evaluate_groups(
            self._adapted, self._groups, self._objective, micro_batch_tokens=self._micro_batch_tokens
        )
        return Evaluated(
            round_number,
            self._objective.metric,
            self._objective.headline(total),
            total.loss,
            total.units,
            {name: self._objective.headline(part) for name, part in parts.items()},
            self._figures(total, sum(self._text_bytes.values())),
            {name: self._figures(part, self._text_bytes.get(name, 0)) for name, part in parts.items()},
            total.classes.by_class(self._labels) if by_class and total.classes is not None and self._labels else None,
        )

    def _figures(self, quality: Quality, text_bytes: int) -> dict[str, float]:
        if quality.classes is not None:
            return quality.classes.figures()
        # Tokenizers cut a text into different numbers of tokens, so that perplexities of two models do not compare.
        return {"bits_per_byte": quality.loss_sum / math.log(2) / text_bytes} if text_bytes else {}

    def evaluate_each(self, adapters: Mapping[str, NamedTensors]) -> PersonalEvaluated | None:
        """Return the quality of each site's own adapter on the site's held-out examples, or on all of them where they
        are not split by site; None without any."""
        parts: dict[str, Quality] = {}
        for site, adapter in adapters.items():
            examples = self._groups.get(site, self._groups.get(_ALL))
            if examples:
                self._adapted.load(adapter)
                parts[site] = evaluate(
                    self._adapted, examples, self._objective, micro_batch_tokens=self._micro_batch_tokens
                )
        if not parts:
            return None
        headline = self._objective.headline
        return PersonalEvaluated(
            self._objective.metric,
            headline(_sum(parts.values())),
            {site: headline(part) for site, part in parts.items()},
        )


def _sum(parts: Iterable[Quality]) -> Quality:
    return reduce(Quality.__add__, parts, Quality())


def build_evaluator(experiment: Experiment, heldout: Sequence[Row] | None = None) -> Evaluator:
    """Return the evaluator of an experiment.

    Args:
        experiment: whose model, adapter, task and held-out data to use.
        heldout: held-out rows; None reads them from `data.source`, which the server can only do in a simulation or
            where that source is public.
    """
    base = load_base(experiment.model, experiment.task, experiment.runtime.device)
    adapted = attach(base, experiment.peft, experiment.task, experiment.strategy.cores)
    rows: Sequence[Row] = []
    if experiment.evaluation.every > 0:
        rows = (
            split_rows(read_rows(experiment.data.source), experiment.data, experiment.seed)[1]
            if heldout is None
            else heldout
        )
    root_rows, rows = split_root(experiment, rows)
    groups = {name: _examples(experiment, adapted, part, name) for name, part in _grouped(experiment, rows).items()}
    root = _examples(experiment, adapted, root_rows, "the root set") if root_rows else ()
    budget = experiment.runtime.micro_batch_tokens
    if reads_summaries(adapted):
        groups = {name: summarized(adapted, part, micro_batch_tokens=budget) for name, part in groups.items()}
    task = experiment.task
    sizes = None if task.labels else {name: _predicted_bytes(adapted, part) for name, part in groups.items()}
    return Evaluator(adapted, groups, build_objective(task), budget, root, labels=task.labels, text_bytes=sizes)


def _predicted_bytes(adapted: AdaptedModel, examples: Iterable[Example]) -> int:
    """Return how many bytes of text the learned tokens are, but for a first one, which nothing predicts."""
    tokens = (example.input_ids[1:][example.trained[1:]].tolist() for example in examples)
    texts = (str(adapted.base.tokenizer.decode(each, skip_special_tokens=True)) for each in tokens)
    return sum(len(text.encode()) for text in texts)


def _grouped(experiment: Experiment, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows by site where the data has a natural key, else all as one group."""
    most = experiment.evaluation.max_examples
    if most is not None and len(rows) > most:
        rows = random.Random(experiment.seed).sample(list(rows), most)
    partition = experiment.data.partition
    groups: dict[str, list[Row]] = {}
    for row in rows:
        name = partition.site_of(row.get(partition.key, _ALL)) if partition.kind == "natural_key" else _ALL
        groups.setdefault(name, []).append(row)
    if partition.kind == "natural_key" and partition.sites is not None:
        wanted = set(map(partition.site_of, partition.sites))
        groups = {name: part for name, part in groups.items() if name in wanted}
    return dict(sorted(groups.items()))


def _examples(experiment: Experiment, adapted: AdaptedModel, rows: Sequence[Row], name: str) -> Sequence[Example]:
    base = adapted.base
    with at_place("held-out records" if name == _ALL else f"held-out records of {name}"):
        examples = tokenize_as_configured(
            rows, experiment.data, base.tokenizer, context=base.context, labels=experiment.task.labels
        ).examples
    check_fits(base, examples)
    return examples
