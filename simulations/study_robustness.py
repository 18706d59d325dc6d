"""`cloister study robustness`: every rule against every attack at every share of attackers.

One line of `results.csv` per cell, written when it is done: a study that was stopped goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from conf.compose import compose_experiment, parse_experiment
from conf.schema import robust as schema
from conf.schema.experiment import Experiment
from finetuning.adapters import AdaptedModel, attach
from finetuning.batches import collate, tokenize_rows
from finetuning.models import load_base
from finetuning.rows import Row
from finetuning.tokenizing import sequence_bound
from protocol.errors import ConfigError
from simulations.attacks import AttackedPopulation, attack_named, triggered
from simulations.population import Population, build_population
from simulations.simulate import simulate
from simulations.study_lines import LineFile, work_through

__all__ = [
    "DEFAULT_ATTACKS",
    "DEFAULT_RULES",
    "RULES",
    "Cell",
    "Result",
    "backdoor_success",
    "cells_of",
    "plot_results",
    "run_robustness",
    "study_experiment",
]

_DEFAULTS = (
    "name=robustness",
    "privacy=none",
    "data.partition={kind:iid,sites:11}",
    "data.max_length=80",
    "federation.rounds=5",
    "federation.local.steps=3",
    "federation.local.expected_batch_size=8",
    "federation.local.optimizer={kind:adamw,learning_rate:0.008}",
    "evaluation.every=5",
    "evaluation.max_examples=120",
    "logging.keep_checkpoints=1",
    "logging.progress=none",
    "runtime.threads=1",
)
_TRIGGERED = 40
"""Held-out records on which the backdoor is tried."""

RULES: dict[str, Callable[[int], schema.Robust]] = {
    "mean": lambda f: schema.NoRobustness(),
    "norm_bound": lambda f: schema.NormBound(max_norm=_RADIUS),
    "median": lambda f: schema.CoordinateMedian(attackers=f),
    "trimmed_mean": lambda f: schema.TrimmedMean(attackers=f),
    "krum": lambda f: schema.Krum(attackers=f),
    "multi_krum": lambda f: schema.MultiKrum(attackers=f),
    "bulyan": lambda f: schema.Bulyan(attackers=f),
    "geometric_median": lambda f: schema.GeometricMedian(attackers=f),
    "centered_clipping": lambda f: schema.CenteredClipping(attackers=f, radius=_RADIUS),
    "fltrust": lambda f: schema.FLTrust(attackers=f),
    "nnm_trimmed_mean": lambda f: schema.TrimmedMean(attackers=f, mixing=schema.NearestNeighbors()),
    "bucketing_median": lambda f: schema.CoordinateMedian(attackers=f, mixing=schema.Bucketing()),
}
"""From the number of attackers that a rule is told to the rule."""
_RADIUS = 1.5
"""Below the length of an honest update at the study's settings, so that a bound does bind."""
DEFAULT_RULES = (
    "mean",
    "norm_bound",
    "median",
    "trimmed_mean",
    "multi_krum",
    "geometric_median",
    "centered_clipping",
)
DEFAULT_ATTACKS = ("sign_flip", "label_flip", "backdoor", "a_little_is_enough", "inner_product")
"""Some ten minutes on two cores together with `DEFAULT_RULES`."""


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    rule: str
    attack: str
    fraction: float

    @property
    def name(self) -> str:
        """The cell's folder."""
        return f"{self.rule}-{self.attack}-{self.fraction:g}"


@dataclass(frozen=True)
class Result:
    """A line of the table. `quality` is the headline metric on the held-out records; both are None where refused."""

    rule: str
    attack: str
    fraction: float
    attackers: int
    sites: int
    metric: str
    quality: float | None
    backdoor_success: float | None
    refused: str
    digest: str

    @property
    def cell(self) -> Cell:
        """What was run."""
        return Cell(self.rule, self.attack, self.fraction)


def study_experiment(overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment of every cell, before its rule."""
    return compose_experiment([*_DEFAULTS, *overrides])


def cells_of(rules: Sequence[str], attacks: Sequence[str], fractions: Sequence[float]) -> Iterator[Cell]:
    """Yield the cells, each rule first without attackers.

    Raises:
        ConfigError: an unknown rule or attack, or a share outside of 0 to 1/2.
    """
    for rule in rules:
        if rule not in RULES:
            raise ConfigError(f"rule {rule!r} does not exist; choose among {', '.join(RULES)}")
    for attack in attacks:
        attack_named(attack)
    for fraction in fractions:
        if not 0 < fraction < 0.5:
            raise ConfigError(f"fraction={fraction:g} of attackers must lie between 0 and 0.5; no rule holds beyond")
    for rule in rules:
        yield Cell(rule, "none", 0.0)
        yield from (Cell(rule, attack, share) for attack in attacks if attack != "none" for share in fractions)


def run_robustness(
    experiment: Experiment,
    cells: Sequence[Cell],
    path: Path,
    on_result: Callable[[Result], None],
    *,
    workers: int = 1,
    prepare: Callable[[], None] | None = None,
) -> list[Result]:
    """Run the cells that `path` has no result of, and return all results in the order of the cells.

    Args:
        experiment: of every cell; another one's results are not taken for it.
        cells: what to run.
        path: the study's folder.
        on_result: takes each result, also those of an earlier start.
        workers: processes; 1 runs the cells in this one.
        prepare: called first in each new process.

    Raises:
        ConfigError: the folder holds another study's results.
    """
    file = LineFile(path / "results.csv", Result)
    known = {each.cell: each for each in file.read() if each.digest == experiment.digest}
    done = {cell: known[cell] for cell in cells if cell in known}
    for result in done.values():
        on_result(result)
    todo = [cell for cell in cells if cell not in done]
    for result in work_through(todo, partial(_run_cell, experiment.canonical_json(), path), workers, prepare):
        file.append(result)
        done[result.cell] = result
        on_result(result)
    return [done[cell] for cell in cells]


def _run_cell(experiment_json: str, path: Path, cell: Cell) -> Result:
    experiment, population = parse_experiment(experiment_json), _population(experiment_json)
    sites, folder = len(population.parts), path / "runs" / cell.name
    attackers = round(cell.fraction * sites)
    # Without an attack a rule still guards against as many as it would be told at a share of 0.2.
    guarded = attackers or max(round(0.2 * sites), 1)
    # What a stop left half done is no result.
    shutil.rmtree(folder, ignore_errors=True)
    nothing = Result(cell.rule, cell.attack, cell.fraction, attackers, sites, "", None, None, "", experiment.digest)
    try:
        ruled = _with_rule(experiment, RULES[cell.rule](guarded))
    except ValidationError as error:  # more attackers than the rule withstands among these sites
        return replace(nothing, refused=str(error.errors()[0]["msg"]).removeprefix("Value error, "))
    attacked = AttackedPopulation(
        population.parts, population.heldout, attack_named(cell.attack), attackers, experiment.seed
    )
    final = simulate(ruled, folder, (), attacked).summary["final"]
    success = backdoor_success(ruled, folder, population.heldout)
    return replace(nothing, metric=final["metric"], quality=float(final["value"]), backdoor_success=success)


def _with_rule(experiment: Experiment, rule: schema.Robust) -> Experiment:
    """Return the experiment under a rule, validated anew: a rule may need more sites than there are."""
    tree = experiment.model_dump(mode="json")
    tree["strategy"]["robust"] = rule.model_dump(mode="json")
    return Experiment.model_validate(tree)


@lru_cache(maxsize=1)
def _population(experiment_json: str) -> Population:
    return build_population(parse_experiment(experiment_json))


def backdoor_success(experiment: Experiment, run: Path, heldout: Sequence[Row]) -> float:
    """Return the share of held-out records with the trigger that a run's adapter answers with the target.

    Greedy decoding writes the target exactly where each of its tokens is the likeliest after the true ones before it,
    so one forward pass tells. Of labels: where the target is predicted.

    Raises:
        DataError: the records have neither prompt nor label.
    """
    base = load_base(experiment.model, experiment.task, experiment.runtime.device)
    adapted = attach(base, experiment.peft, experiment.task)
    adapted.load(load_file(run / "adapter" / "adapter_model.safetensors"))
    rows = triggered(heldout[:_TRIGGERED], experiment.data.columns)
    examples = tokenize_rows(
        rows,
        experiment.data.columns,
        adapted.base.tokenizer,
        max_length=sequence_bound(None, adapted.base.tokenizer, adapted.base.context),
        train_on=experiment.data.train_on,
        special_tokens=experiment.data.special_tokens,
        labels=experiment.task.labels,
    ).examples
    adapted.network.eval()
    with torch.inference_mode():
        hits = [_hit(adapted, collate([example], adapted.base.pad_token_id)) for example in examples]
    return sum(hits) / len(hits)


def _hit(adapted: AdaptedModel, batch: Any) -> bool:
    batch = batch.to(adapted.base.device)
    output = cast("Any", adapted.network)(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    if batch.labels is not None:
        return bool((output.logits.argmax(-1) == batch.labels).all())
    predicted, wanted = output.logits[:, :-1].argmax(-1), batch.targets[:, 1:]
    return bool((predicted == wanted)[wanted >= 0].all())


def plot_results(results: Sequence[Result], path: Path) -> Path:
    """Draw a map of rule x attack, quality in each cell, and return the file's path."""
    # The figure is built without pyplot: no global state, and no window on a machine without a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rules = list(dict.fromkeys(each.rule for each in results))
    columns = list(dict.fromkeys((each.attack, each.fraction) for each in results))
    grid = [[float("nan")] * len(columns) for _ in rules]
    for each in results:
        if each.quality is not None:
            grid[rules.index(each.rule)][columns.index((each.attack, each.fraction))] = each.quality
    figure: Any = Figure(figsize=(2.5 + 0.9 * len(columns), 1.8 + 0.4 * len(rules)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    metric = next((each.metric for each in results if each.metric), "quality")
    seen = sorted(value for row in grid for value in row if value == value)
    # Perplexities of a broken model would hide every other difference.
    top = seen[max(int(0.75 * len(seen)) - 1, 0)] if seen else 1.0
    better_low = metric == "perplexity"
    image = axes.imshow(grid, cmap="RdYlGn_r" if better_low else "RdYlGn", vmax=2 * top if better_low else None)
    axes.set_xticks(range(len(columns)), [f"{attack}\n{share:g}" for attack, share in columns], rotation=30, ha="right")
    axes.set_yticks(range(len(rules)), rules)
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            text = f"{value:.3g}" if value == value else "refused"
            axes.text(column, row, text, ha="center", va="center", fontsize="x-small")
    figure.colorbar(image, label=f"{metric} on held-out records")
    figure.savefig(path, dpi=150)
    return path
