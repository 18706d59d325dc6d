"""Which runs answer which question: the grids of `cloister study strategies`, `bits` and `ranks`.

Each cell of a grid sees about as many records per step in all, whatever the number of sites, so that they differ in
what is compared and not in how much was trained. Gradients that are clipped and noised want plain SGD at a high rate,
exact ones do not (docs/decisions/0004-defaults.md). A strategy that is run at another's rate says nothing, so each has
its own below; `rate_factors` tries more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from conf.compose import CONFIG_DIRECTORY
from protocol.errors import ConfigError
from simulations.study_cells import Cell, Labels, compose_cell
from simulations.study_sets import DataSet

__all__ = [
    "Grid",
    "bits_cells",
    "codecs_known",
    "default_codecs",
    "ranks_cells",
    "strategies_cells",
    "strategies_known",
]

_RATES = {"ffa_lora": 4.0, "fedex": 0.5, "fedsb": 8.0, "ravan": 8.0}
_RATE = 2.0
"""Of noised SGD, where nothing else is said: the best of those tried, a factor of 4 apart, at ε = 8 with eight sites. A
frozen factor is short, so that steps beside it move less; between two frozen bases they hardly move."""
_OPEN_RATES = {"ffa_lora": 0.032, "fedsvd": 0.032, "fedsb": 0.512, "ravan": 0.512}
_OPEN_RATE = 8e-3
"""Of AdamW without privacy, likewise."""
_CODEC_SETTING = {"eden": "bits", "uniform_entropy": "bits", "lattice": "bits", "topk": "fraction"}
_CODEC_SERIES = {
    "eden": ("0.5", "1", "2", "3", "4", "8"),
    "uniform_entropy": ("1", "2", "4"),
    "topk": ("0.05",),
}


@dataclass(frozen=True)
class Grid:
    """What the grids have in common."""

    sets: Sequence[DataSet]
    epsilons: Sequence[float]
    """Infinite: without privacy."""
    partitions: Sequence[str]
    sites: Sequence[int]
    seeds: Sequence[int]
    rounds: int = 6
    steps: int = 4
    records: float = 192.0
    """Expected per step, over all sites."""
    rate_factors: Sequence[float] = (1.0,)
    overrides: Sequence[str] = ()
    """Of every cell, last."""

    def cells(self, study: str, variants: Iterable[tuple[str, str, str]]) -> list[Cell]:
        """Return a cell per variant (strategy, codec, ranks) and point of the grid.

        Raises:
            ConfigError: no cell can be run.
        """
        points = list(product(self.sets, self._places(), self.epsilons, self.rate_factors, self.seeds))
        cells = [
            self._cell(study, data, place, epsilon, factor, seed, variant)
            for variant in variants
            for data, place, epsilon, factor, seed in points
        ]
        if cells and all(cell.refused for cell in cells):
            raise ConfigError(f"no cell of the study can be run: {cells[0].refused}")
        return cells

    def _places(self) -> list[tuple[str, int]]:
        """Return the partitions with their numbers of sites: the data's own split has one number, its own."""
        counts: dict[str, Sequence[int]] = {kind: (0,) if kind == "own" else self.sites for kind in self.partitions}
        return [(kind, count) for kind, several in counts.items() for count in several]

    def _cell(
        self,
        study: str,
        data: DataSet,
        place: tuple[str, int],
        epsilon: float,
        factor: float,
        seed: int,
        variant: tuple[str, str, str],
    ) -> Cell:
        (strategy, codec, ranks), (partition, sites) = variant, place
        optimizer, rate = _optimizer(strategy, epsilon, factor)
        labels = Labels(study, data.name, strategy, codec, ranks, epsilon, partition, sites, rate, seed)
        privacy = ("privacy=none",)
        if math.isfinite(epsilon):
            privacy = ("privacy=example_level", f"privacy.target_epsilon={epsilon:g}")
        overrides = (
            *data.overrides,
            data.partition(partition, sites),
            f"strategy={strategy}",
            *_codec_overrides(codec),
            *privacy,
            f"federation.rounds={self.rounds}",
            f"evaluation.every={self.rounds}",
            f"federation.local.steps={self.steps}",
            f"federation.local.expected_batch_size={max(self.records / (sites or 4), 1):g}",
            f"federation.local.optimizer={{kind:{optimizer},learning_rate:{rate:g}}}",
            *((f"federation.site_ranks=[{ranks}]",) if ranks else ()),
            *self.overrides,
        )
        return compose_cell(labels, overrides)


def strategies_cells(grid: Grid, strategies: Sequence[str]) -> list[Cell]:
    """Return the cells of "which strategy should I pick".

    Raises:
        ConfigError: an unknown strategy.
    """
    _check("strategy", strategies, strategies_known())
    return grid.cells("strategies", [(strategy, "none", "") for strategy in strategies])


def bits_cells(grid: Grid, strategy: str, codecs: Sequence[str]) -> list[Cell]:
    """Return the cells of "how many bits do I need"; a codec is NAME or NAME:SETTING, as in eden:2 and topk:0.05.

    Raises:
        ConfigError: an unknown strategy or codec, or a setting of one that has none.
    """
    _check("strategy", [strategy], strategies_known())
    _check("codec", [codec.partition(":")[0] for codec in codecs], codecs_known())
    for codec in codecs:
        name, colon, _ = codec.partition(":")
        if colon and name not in _CODEC_SETTING:
            raise ConfigError(f"codec {codec!r}: {name} has no setting; {', '.join(_CODEC_SETTING)} have one")
    return grid.cells("bits", [(strategy, codec, "") for codec in codecs])


def ranks_cells(grid: Grid, strategies: Sequence[str], ranks: Sequence[str]) -> list[Cell]:
    """Return the cells of "mixed ranks: what do weak sites lose"; ranks are as `8,8,2,2`, which sites take in turn.

    Raises:
        ConfigError: an unknown strategy, or ranks that are no positive integers.
    """
    _check("strategy", strategies, strategies_known())
    for each in ranks:
        if not all(part.isdecimal() and int(part) > 0 for part in each.split(",")):
            raise ConfigError(f"ranks {each!r} must be positive integers with commas between, such as 8,8,2,2")
    return grid.cells("ranks", [(strategy, "none", each) for strategy in strategies for each in ranks])


def strategies_known() -> list[str]:
    """Return the members of the group `strategy`."""
    return _members("strategy")


def codecs_known() -> list[str]:
    """Return the members of the group `quantization`."""
    return _members("quantization")


def default_codecs() -> list[str]:
    """Return every codec, those with a rate at several; `none`, the reference, first."""
    named = [name for name in codecs_known() if name not in ("none", "lattice")]
    series = [
        [f"{name}:{value}" for value in _CODEC_SERIES[name]] if name in _CODEC_SERIES else [name] for name in named
    ]
    return ["none", *(codec for several in series for codec in several)]


def _members(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIRECTORY / group).glob("*.yaml"))


def _check(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{what} {name!r} does not exist; choose among {', '.join(known)}")


def _codec_overrides(codec: str) -> tuple[str, ...]:
    name, _, value = codec.partition(":")
    return (f"quantization={name}", *((f"quantization.{_CODEC_SETTING[name]}={value}",) if value else ()))


def _optimizer(strategy: str, epsilon: float, factor: float) -> tuple[str, float]:
    if math.isinf(epsilon):
        return "adamw", factor * _OPEN_RATES.get(strategy, _OPEN_RATE)
    return "sgd", factor * _RATES.get(strategy, _RATE)
