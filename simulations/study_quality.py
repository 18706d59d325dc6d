"""`cloister study quality`: what a user gets who sets nothing but model, data and ε, against what is possible.

A classifier is held against a linear probe: logistic regression on the same frozen summaries, of all training records
in one place, without privacy. A language model is held against its own federated run without privacy: the share of the
gap in nats between that and the base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from torch.nn.functional import cross_entropy

from conf.schema.experiment import Experiment
from finetuning.adapters import attach
from finetuning.batches import tokenize_as_configured
from finetuning.models import load_base
from finetuning.summaries import reads_summaries, summarized
from simulations.population import build_population
from simulations.study_cells import Cell, Labels, Line, compose_cell

__all__ = [
    "EMBEDDED",
    "SETS",
    "QualitySet",
    "Standing",
    "markdown_of",
    "plot",
    "probe_accuracy",
    "quality_cells",
    "standings",
]

_SETTINGS = ("evaluation.max_examples=2000", "evaluation.every=100000")
_CHOSEN = "as chosen"
_DECAYS = (1e-5, 1e-4, 1e-3)
_VALIDATED = 10
"""One record in so many chooses the probe's weight decay."""


@dataclass(frozen=True)
class QualitySet:
    """A data set as a user describes it; `label` is the column that skews a partition; `classes`: it is learned."""

    name: str
    overrides: tuple[str, ...]
    label: str
    classes: bool


EMBEDDED = QualitySet("clinics", ("data=clinics", "model=clinic_base"), "topic", classes=False)
_SPLIT = ("data.split_column=split", "data.heldout_value=test")
_LABELLED = ("task=classification", "data=csv_labelled", "data.source.format=jsonl", *_SPLIT)
_QA = ("data=jsonl_instruction", "data.columns={kind:instruction,instruction:instruction,input:null,response:response}")
SETS: Mapping[str, QualitySet] = {
    each.name: each
    for each in (
        QualitySet("sentiment_3sites", _LABELLED, "label", classes=True),
        QualitySet("banking77", _LABELLED, "label", classes=True),
        QualitySet("clinc150", _LABELLED, "label", classes=True),
        QualitySet("medquad", _QA, "qtype", classes=False),
        QualitySet("shakespeare_roles", ("data=jsonl_text", "data.group_column=client"), "play", classes=False),
    )
}
"""Public sets by the name of their folder, which holds `normalized.jsonl` (docs/studies.md)."""


@dataclass(frozen=True)
class Standing:
    """How far runs without a setting get at one place and ε: mean over seeds, and the best less the worst seed."""

    place: str
    epsilon: float
    metric: str
    base: float
    quality: float
    spread: float
    seeds: int
    possible: float | None
    """The probe's accuracy, or the perplexity without privacy; None where it is not known."""
    share: float | None
    """Of what is possible: accuracy over the probe's, or the closed share of the gap in nats."""
    minutes: float


def quality_cells(
    sets: Iterable[QualitySet],
    folder: Path | None,
    encoder: Path | None,
    places: Sequence[str],
    epsilons: Sequence[float],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
) -> list[Cell]:
    """Return one cell per set, place (`dirichlet:0.5:6` is a partition and a number of sites), ε and seed."""
    grid = product(sets, places, epsilons, seeds)
    return [_cell(data, folder, encoder, place, epsilon, seed, overrides) for data, place, epsilon, seed in grid]


def _cell(
    data: QualitySet,
    folder: Path | None,
    encoder: Path | None,
    place: str,
    epsilon: float,
    seed: int,
    overrides: Sequence[str],
) -> Cell:
    partition, _, sites = place.rpartition(":")
    labels = Labels("quality", data.name, _CHOSEN, "none", "", epsilon, partition, int(sites), 0.0, seed)
    private = ("privacy=none",) if math.isinf(epsilon) else (f"privacy.target_epsilon={epsilon:g}",)
    kind, _, alpha = partition.partition(":")
    skew = f",alpha:{alpha},label:{data.label}" if kind == "dirichlet" else ""
    spread = f"data.partition={{kind:{kind},sites:{sites}{skew}}}"
    return compose_cell(labels, [*_data_of(data, folder, encoder), spread, *private, *_SETTINGS, *overrides])


def _data_of(data: QualitySet, folder: Path | None, encoder: Path | None) -> tuple[str, ...]:
    if data is EMBEDDED or folder is None:
        return data.overrides
    path = folder / data.name / "normalized.jsonl"
    source = (*data.overrides, f"data.source.path={path}")
    if not data.classes:
        return (*source, "model=causal_lm", f"model.path={folder / 'stories260k'}")
    labels = ",".join(f"'{label}'" for label in _labels(path))
    return (*source, "model=encoder", f"model.path={encoder}", f"task.labels=[{labels}]")


def _labels(path: Path) -> list[str]:
    """Return the names of a public set's classes that are trained on."""
    with path.open() as stream:
        rows = [json.loads(line) for line in stream]
    return sorted({str(row["label"]) for row in rows if row.get("split") == "train"})


def probe_accuracy(experiment: Experiment) -> float | None:
    """Return the held-out accuracy of logistic regression on summaries of all training records, in one place.

    The weight decay is the best of three on a tenth of the training records. None where the model makes no summaries.
    """
    population = build_population(experiment)
    base = load_base(experiment.model, experiment.task, experiment.runtime.device)
    adapted = attach(base, experiment.peft.model_copy(update={"targets": "none"}), experiment.task)
    if not reads_summaries(adapted):
        return None
    features: list[torch.Tensor] = []
    classes: list[torch.Tensor] = []
    for rows in ([row for part in population.parts.values() for row in part], population.heldout):
        examples = tokenize_as_configured(
            rows, experiment.data, base.tokenizer, context=base.context, labels=experiment.task.labels
        ).examples
        made = summarized(adapted, examples, micro_batch_tokens=experiment.runtime.micro_batch_tokens)
        features.append(torch.stack([torch.from_numpy(each.summary) for each in made]))
        classes.append(torch.tensor([each.label for each in made]))
    (train, held), (labels, truth) = features, classes
    count = len(experiment.task.labels or ())
    chosen = torch.arange(len(train)) % _VALIDATED == 0
    tried = {
        decay: _accuracy(_fitted(train[~chosen], labels[~chosen], count, decay), train[chosen], labels[chosen])
        for decay in _DECAYS
    }
    best = max(tried, key=lambda decay: tried[decay])
    return _accuracy(_fitted(train, labels, count, best), held, truth)


def _fitted(features: torch.Tensor, labels: torch.Tensor, classes: int, decay: float) -> torch.Tensor:
    """Return W of shape (classes, features + 1), the bias last, by L-BFGS on cross entropy + decay ‖W‖²."""
    weights = torch.zeros(classes, features.shape[1] + 1, requires_grad=True)
    extended = _extended(features)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = cross_entropy(extended @ weights.T, labels) + decay * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType] - torch's own stub wants a float
    return weights.detach()


def _accuracy(weights: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> float:
    return float(((_extended(features) @ weights.T).argmax(dim=1) == labels).double().mean())


def _extended(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features, torch.ones(len(features), 1)], dim=1)


def standings(lines: Sequence[Line], probes: Mapping[str, float]) -> list[Standing]:
    """Return how far each place and ε got; `probes` gives the probe's accuracy by name of the data set."""
    found: dict[tuple[str, str, int, float], list[Line]] = {}
    for line in lines:
        if line.quality is not None:
            found.setdefault((line.data, line.partition, line.sites, line.epsilon), []).append(line)
    return [_standing(key, several, found, probes) for key, several in found.items()]


def _standing(
    key: tuple[str, str, int, float],
    lines: Sequence[Line],
    found: Mapping[tuple[str, str, int, float], Sequence[Line]],
    probes: Mapping[str, float],
) -> Standing:
    data, partition, sites, epsilon = key
    quality, base = mean(_of(lines)), mean(line.base for line in lines if line.base is not None)
    if lines[0].metric == "accuracy":
        possible = probes.get(data)
        share = None if possible is None else quality / possible
    else:
        open_runs = found.get((data, partition, sites, math.inf))
        possible = None if open_runs is None else mean(_of(open_runs))
        gap = None if possible is None else math.log(base) - math.log(possible)
        share = (math.log(base) - math.log(quality)) / gap if gap else None
    return Standing(
        place=f"{data}, {partition}, {sites} sites",
        epsilon=epsilon,
        metric=lines[0].metric,
        base=base,
        quality=quality,
        spread=max(_of(lines)) - min(_of(lines)),
        seeds=len(lines),
        possible=possible,
        share=share,
        minutes=mean(line.seconds for line in lines) / 60,
    )


def _of(lines: Sequence[Line]) -> list[float]:
    return [line.quality for line in lines if line.quality is not None]


def markdown_of(found: Sequence[Standing]) -> str:
    """Return the table, ready to be pasted into a document."""
    rows = [
        "| data, partition, sites | ε | metric | base | tuned | seeds, spread | possible | share | minutes |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in found:
        show: Callable[[float | None], str] = _percent if each.metric == "accuracy" else _three_digits
        privacy = "none" if math.isinf(each.epsilon) else f"{each.epsilon:g}"
        share = "–" if each.share is None else f"{each.share:.3f}"
        cells = (
            *(each.place, privacy, each.metric, show(each.base), show(each.quality)),
            *(f"{each.seeds}, {show(each.spread)}", show(each.possible), share, f"{each.minutes:.1f}"),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _three_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def plot(found: Sequence[Standing], path: Path) -> Path:
    """Draw the share of what is possible against ε, one line per place, and return the picture's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for place in dict.fromkeys(each.place for each in found):
        points = sorted(
            (each.epsilon, each.share)
            for each in found
            if each.place == place and each.share is not None and math.isfinite(each.epsilon)
        )
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=place)
    axes.set(xlabel="ε", ylabel="share of what is possible", xscale="log")
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    figure.savefig(path)
    return path
