"""One data set spread over simulated sites: by a column, evenly, by skewed labels, or by skewed sizes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import numpy as np

from conf.schema.data import (
    DirichletPartition,
    IidPartition,
    NaturalKeyPartition,
    Partition,
    SizeSkewedPartition,
)
from finetuning.people import is_blank, spelling_of
from finetuning.rows import Row, at_place, cell, nearest, place_of
from protocol.errors import DataError

__all__ = [
    "OTHERS",
    "Holdings",
    "partition",
    "plot_partition",
    "published_count",
    "who_holds_what",
]

_log = logging.getLogger(__name__)

OTHERS = "(others)"
"""Column of `Holdings` that gathers all values but the most frequent ones."""

_DIRICHLET_DRAWS = 100


@dataclass(frozen=True, slots=True)
class Holdings:
    """How many records of each value each site holds: `counts[site][value]`."""

    sites: tuple[str, ...]
    values: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def totals(self) -> tuple[int, ...]:
        """Records per site."""
        return tuple(sum(row) for row in self.counts)


def partition(rows: Sequence[Row], config: Partition, seed: int) -> dict[str, list[Row]]:
    """Return the rows of each site, sites in the order of their names, rows in the order they came in.

    Every row is at exactly one site. Exceptions: `natural_key` with `sites` takes only those, and leaves out sites with
    fewer than `min_records`. Two spellings of one name (`finetuning.people`) are one natural key. Synthetic sites are
    named `site-1`, `site-2`, ... with leading zeros as needed; under `size_skewed` the first is the largest.

    Raises:
        DataError: a column is missing, a site is unknown, there are fewer rows than sites, or a site gets no record.
    """
    match config:
        case NaturalKeyPartition():
            return _by_key(rows, config)
        case IidPartition():
            _check_enough(rows, config.sites)
            owners = np.random.default_rng(seed).permutation(np.arange(len(rows)) % config.sites)
        case DirichletPartition():
            _check_enough(rows, config.sites)
            owners = _dirichlet_owners(rows, config, seed)
        case SizeSkewedPartition():
            _check_enough(rows, config.sites)
            owners = _skewed_owners(len(rows), config, seed)
        case _:
            assert_never(config)
    parts: dict[str, list[Row]] = {_site_name(index, config.sites): [] for index in range(config.sites)}
    names = list(parts)
    for row, owner in zip(rows, owners.tolist(), strict=True):
        parts[names[owner]].append(row)
    return parts


def who_holds_what(parts: Mapping[str, Sequence[Row]], column: str | None, *, most: int = 8) -> Holdings:
    """Return the counts per site of the `most` frequent values of a column; with None, of records."""
    if column is None:
        return Holdings(tuple(parts), ("records",), tuple((len(rows),) for rows in parts.values()))
    per_site = [Counter(str(row.get(column)) for row in rows) for rows in parts.values()]
    overall = Counter[str]()
    for counts in per_site:
        overall.update(counts)
    ranked = sorted(overall, key=lambda value: (-overall[value], value))
    named, rest = sorted(ranked[:most]), ranked[most:]
    counts = [
        (*(counts[value] for value in named), *((sum(counts[value] for value in rest),) if rest else ()))
        for counts in per_site
    ]
    return Holdings(tuple(parts), (*named, *((OTHERS,) if rest else ())), tuple(counts))


def plot_partition(parts: Mapping[str, Sequence[Row]], column: str | None, path: Path) -> Path:
    """Draw one stacked bar per site and return the file's path; `.svg`, `.png` and `.pdf` are known.

    Raises:
        DataError: for another extension, or a folder that does not exist.
    """
    if path.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise DataError(f"{path}: a plot ends in .svg, .png or .pdf, not {path.suffix or 'nothing'!r}")
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist; create it first")
    # The figure is built without pyplot: no global state, and no window on a machine without a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    held = who_holds_what(parts, column)
    figure: Any = Figure(figsize=(6.4, 1.2 + 0.32 * len(held.sites)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = np.zeros(len(held.sites))
    for index, value in enumerate(held.values):
        widths = np.array([counts[index] for counts in held.counts])
        axes.barh(held.sites, widths, left=left, label=value)
        left = left + widths
    axes.invert_yaxis()
    axes.set_xlabel("records")
    if column is not None:
        axes.legend(title=column, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
    return path


def _by_key(rows: Sequence[Row], config: NaturalKeyPartition) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    values: dict[str, str] = {}
    keys = [_key_of(row, number, config) for number, row in enumerate(rows, start=1)]
    usual = _usual_spellings(keys, config)
    for number, (row, key) in enumerate(zip(rows, keys, strict=True), start=1):
        value = usual[spelling_of(key)]
        name = config.site_of(value)
        if values.setdefault(name, value) != value:
            place = place_of(row, number)
            raise DataError(f"{place}: sites {values[name]!r} and {value!r} would both be called {name!r}; rename one")
        found.setdefault(name, []).append(row)
    if config.sites is None:
        parts = {name: found[name] for name in sorted(found) if len(found[name]) >= config.min_records}
        if not parts:
            largest = max((len(records) for records in found.values()), default=0)
            raise DataError(
                f"no site has data.partition.min_records={config.min_records} records or more; "
                f"the largest has {largest}; lower it"
            )
        return parts
    asked = sorted(config.site_of(usual.get(spelling_of(site), site)) for site in config.sites)
    if twice := [name for name, count in Counter(asked).items() if count > 1]:
        raise DataError(f"data.partition.sites names {twice[0]!r} in {asked.count(twice[0])} spellings; name it once")
    return {name: _named_site(name, found, config) for name in asked}


def _key_of(row: Row, number: int, config: NaturalKeyPartition) -> object:
    place = place_of(row, number)
    with at_place(place):
        value = cell(row, config.key, "data.partition.key")
    if is_blank(value):
        raise DataError(
            f"{place}: column {config.key!r} names no site; fill it in, or set data.partition.key to another"
        )
    return value


def _usual_spellings(keys: Sequence[object], config: NaturalKeyPartition) -> dict[str, str]:
    """Return by its canonical spelling how each site is written most often; a site is one, however it is written."""
    written: dict[str, Counter[str]] = {}
    for key in keys:
        written.setdefault(spelling_of(key), Counter())[str(key)] += 1
    joined = sum(len(counts) - 1 for counts in written.values())
    if joined:
        _log.warning(
            "data.partition.key=%r names %d sites in %d spellings: %d differed from another only in case, blanks or "
            "the form of letters and digits, and were joined with it",
            config.key,
            len(written),
            len(written) + joined,
            joined,
        )
    return {same: min(counts, key=lambda text: (-counts[text], text)) for same, counts in written.items()}


def _named_site(name: str, found: Mapping[str, list[Row]], config: NaturalKeyPartition) -> list[Row]:
    if name not in found:
        known = sorted(found)
        shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise DataError(
            f"column {config.key!r} has no site {name!r}{nearest(name, known)}; sites: {shown or 'none'}; "
            "set data.partition.sites"
        )
    if len(found[name]) < config.min_records:
        raise DataError(
            f"site {name!r} has {len(found[name])} records, fewer than data.partition.min_records="
            f"{config.min_records}; lower it, or drop the site from data.partition.sites"
        )
    return found[name]


def _site_name(index: int, sites: int) -> str:
    return f"site-{index + 1:0{len(str(sites))}d}"


def _check_enough(rows: Sequence[Row], sites: int) -> None:
    if len(rows) < sites:
        raise DataError(
            f"{len(rows)} records cannot fill {sites} sites with at least one each; "
            f"set data.partition.sites to {max(len(rows), 1)} or less"
        )


def _dirichlet_owners(rows: Sequence[Row], config: DirichletPartition, seed: int) -> np.ndarray[Any, Any]:
    """Draw each label's shares over the sites, anew until every site has a record."""
    by_label: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        with at_place(place_of(row, index + 1)):
            by_label.setdefault(str(cell(row, config.label, "data.partition.label")), []).append(index)
    generator = np.random.default_rng(seed)
    owners = np.zeros(len(rows), dtype=np.int64)
    empty = np.zeros(0, dtype=np.int64)
    for _ in range(_DIRICHLET_DRAWS):
        for label in sorted(by_label):
            indices = np.array(by_label[label])
            shares = generator.dirichlet(np.full(config.sites, config.alpha))
            # A tiny alpha underflows to 0/0: in that limit one site holds the whole label.
            if not np.isfinite(shares).all():
                shares = np.eye(config.sites)[generator.integers(config.sites)]
            counts = generator.multinomial(len(indices), shares)
            owners[generator.permutation(indices)] = np.repeat(np.arange(config.sites), counts)
        empty = np.flatnonzero(np.bincount(owners, minlength=config.sites) == 0)
        if not len(empty):
            return owners
    raise DataError(
        f"after {_DIRICHLET_DRAWS} draws {_site_name(int(empty[0]), config.sites)} still has no record: "
        f"data.partition.alpha={config.alpha} is too uneven for {len(rows)} records over {config.sites} sites; "
        "raise data.partition.alpha or lower data.partition.sites"
    )


def _skewed_owners(rows: int, config: SizeSkewedPartition, seed: int) -> np.ndarray[Any, Any]:
    steps = np.arange(config.sites) / max(config.sites - 1, 1)
    weights = config.ratio**-steps
    exact = rows * weights / weights.sum()
    sizes = np.floor(exact).astype(np.int64)
    # Largest remainders get the records that rounding down left over; ties go to the earlier site.
    left_over = rows - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:left_over]] += 1
    if not sizes.all():
        raise DataError(
            f"{_site_name(int(np.argmin(sizes)), config.sites)} is left with no record: {rows} records over "
            f"{config.sites} sites at data.partition.ratio={config.ratio:g}; lower data.partition.ratio or sites"
        )
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(config.sites), sizes))


def published_count(records: int) -> int:
    """Return a count rounded up to two digits: what a simulated site says in public. Every record has a slot in it."""
    step = 10 ** max(len(str(records)) - 2, 0)
    return max(-(-records // step) * step, 1)
