"""`cloister plan`: what a run will cost and how noisy it will be, before anything is spent."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.chosen import print_chosen
from cli.outputs import FIGURES, check_output
from cli.paths import at_home

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from conf.schema.experiment import Experiment
    from privacy.forecast import Outlook, Scenario

__all__ = ["plan_command"]

_SHOWN = 8
"""Distinct published counts that are looked at; of more, evenly spread ones."""
_SEARCHES = (3, 10)
_HOPELESS = 0.05
"""Signal over noise of a whole run, at most, below which nothing was ever seen to be learned."""
_GROUPS = (2, 4, 8)
"""Records of one person whose ε is told where each record is protected alone."""


@dataclass(frozen=True)
class _Forecast:
    """Everything that is printed."""

    sites: int
    outlooks: tuple[Outlook, ...]
    neediest: Outlook | None
    others: tuple[Outlook, ...]
    searches: tuple[tuple[int, float, float], ...]
    """Runs, ε when all of them are told, and ε when the best of a random number of them is."""
    groups: tuple[tuple[int, float], ...]
    """Records of one person, and the ε of all of them together."""
    parameters: int | None
    person: float | None
    """ε of a person known at `federation.sites_per_person` sites, each of whose records is protected at its site."""

    @property
    def problems(self) -> tuple[Outlook, ...]:
        return tuple(each for each in self.outlooks if each.problem)


def plan_command(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as strategy=fedit")] = None,
    records: Annotated[
        str | None, typer.Option("--records", help="Published counts of real sites instead of the simulated ones.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", callback=at_home, help="Write a figure.", metavar="FILE.png")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON alone.")] = False,
) -> None:
    """Show noise, ε per round, and signal against noise, for each site; what other settings would do; what cannot be.

    Trains nothing and spends nothing. The signal-to-noise ratio (SNR) is the most that it can be: a step's signal is at
    most the clip norm C, its noise σ·C·√d/B, for d trained values and an expected batch of B. Over N steps and K sites
    the ratio of the averaged update is at most B·√(N·K) / (σ·√d).

    Exit code 5 when a site cannot take part.
    """
    from conf.compose import compose_experiment

    if plot is not None:
        check_output(plot, FIGURES, "--plot")
    experiment = compose_experiment(overrides or [])
    found = _forecast(experiment, _counts(experiment, records))
    if plot is not None:
        from cli.outlooks import plot_outlooks

        others = found.others if found.neediest is None else (replace(found.neediest, label="as it is"), *found.others)
        plot_outlooks(found.outlooks, others, plot)
    if as_json:
        _print_json(experiment, found)
    else:
        from rich.console import Console

        print_chosen(overrides or [], Console())
        _print(experiment, found)
    if found.problems:
        from protocol.errors import PrivacyError

        raise typer.Exit(PrivacyError.exit_code)


def _counts(experiment: Experiment, records: str | None) -> dict[str, int]:
    """Return each site's published count."""
    from protocol.errors import ConfigError

    if records is not None:
        parts = [part.strip() for part in records.split(",")]
        if not all(re.fullmatch(r"[0-9]{1,12}", part) and int(part) > 0 for part in parts):
            raise ConfigError(f"--records={records}: give positive counts with commas, such as --records 1000,2000")
        return {f"site-{number}": int(part) for number, part in enumerate(parts, start=1)}
    from conf.schema.privacy import local_privacy
    from finetuning.datasets import read_rows, split_rows
    from finetuning.people import people_of, users_of
    from simulations.partition import partition, published_count

    everything = read_rows(experiment.data.source)
    column = experiment.data.user_column if local_privacy(experiment.privacy).kind == "user_level" else None
    if column is not None:
        people_of(everything, column)
    rows, _ = split_rows(everything, experiment.data, experiment.seed)
    sites = partition(rows, experiment.data.partition, experiment.seed)
    return {name: published_count(users_of(own, column) or len(own)) for name, own in sites.items()}


def _forecast(experiment: Experiment, counts: dict[str, int]) -> _Forecast:
    from conf.schema.privacy import NoPrivacy, local_privacy
    from finetuning.shapes import trained_values
    from privacy.forecast import Scenario, forecast, of_rank, variations

    def values(rank: int) -> int | None:
        peft = experiment.peft.model_copy(update={"rank": rank})
        return trained_values(experiment.model, peft, experiment.strategy, experiment.task)

    federation, privacy, rank = experiment.federation, local_privacy(experiment.privacy), experiment.peft.rank
    parameters, cohort = values(rank), federation.cohort_size or len(counts)
    whole = _whole_sites(experiment, counts, parameters)
    if whole and isinstance(privacy, NoPrivacy):
        return _Forecast(len(counts), whole, None, (), (), (), parameters, None)
    scenarios = [
        Scenario(name, privacy, federation.local, federation.rounds, published, cohort, parameters)
        for name, published in _spread(counts)
    ]
    # The smallest site is drawn from most often, and needs the most noise.
    least = min(scenarios, key=lambda scenario: scenario.published)
    with _pool() as over:
        outlooks = forecast([*scenarios, *variations(least)], over)
        sites, others = outlooks[: len(scenarios)], outlooks[len(scenarios) :]
        neediest = sites[scenarios.index(least)]
        searches, groups = _costs(least, neediest, over)
    person = _person(list(zip(scenarios, sites, strict=True)), counts, federation.sites_per_person)
    if rank > 1:
        others.append(of_rank(neediest, rank // 2, parameters, values(rank // 2)))
    return _Forecast(len(counts), (*whole, *sites), neediest, tuple(others), searches, groups, parameters, person)


def _whole_sites(experiment: Experiment, counts: dict[str, int], parameters: int | None) -> tuple[Outlook, ...]:
    """Return the line of a client-level federation; none where no whole site is protected."""
    from conf.schema.privacy import ClientLevel
    from privacy.client_level import bounded_weights
    from privacy.forecast import client_outlook

    privacy = experiment.privacy
    if not isinstance(privacy, ClientLevel):
        return ()
    weights = bounded_weights(counts, experiment.strategy.weights, privacy.max_weight)
    return (client_outlook(privacy, experiment.federation, weights, parameters),)


def _person(sites: list[tuple[Scenario, Outlook]], counts: dict[str, int], several: int) -> float | None:
    """Return the ε of a person known at several sites; sites with equal counts have equal figures."""
    from conf.schema.privacy import NoPrivacy
    from privacy.forecast import person_cost

    if any(outlook.problem or isinstance(scenario.privacy, NoPrivacy) for scenario, outlook in sites):
        return None
    alike: dict[int, tuple[Scenario, Outlook]] = {
        scenario.published: (scenario, outlook) for scenario, outlook in sites
    }
    # Where not every count is shown, any site may be like any that is.
    complete = set(counts.values()) == set(alike)
    many = {count: list(counts.values()).count(count) if complete else len(counts) for count in alike}
    return person_cost([(*pair, many[count]) for count, pair in alike.items()], min(several, len(counts)))


def _costs(
    least: Scenario, neediest: Outlook, over: Callable[..., Iterable[Any]]
) -> tuple[tuple[tuple[int, float, float], ...], tuple[tuple[int, float], ...]]:
    """Return what searching for settings costs, and what several records of one person cost."""
    from functools import partial

    from conf.schema.privacy import ExampleLevel, NoPrivacy
    from privacy.forecast import group_cost, search_cost, selection_cost

    if neediest.problem or isinstance(least.privacy, NoPrivacy):
        return (), ()
    sizes = _GROUPS if isinstance(least.privacy, ExampleLevel) else ()
    groups = over(partial(group_cost, least, neediest), sizes)
    told = over(partial(search_cost, least, neediest), _SEARCHES)
    best = over(partial(selection_cost, least, neediest), _SEARCHES)
    return tuple(zip(_SEARCHES, told, best, strict=True)), tuple(zip(sizes, groups, strict=True))


def _spread(counts: dict[str, int]) -> list[tuple[str, int]]:
    """Return one site per distinct count, smallest first, and not too many: equal counts have equal figures."""
    if len(counts) <= _SHOWN:
        return list(counts.items())
    first: dict[int, str] = {}
    for name, count in counts.items():
        first.setdefault(count, name)
    distinct = sorted((count, name) for count, name in first.items())
    step = max(1.0, (len(distinct) - 1) / (_SHOWN - 1))
    chosen = sorted({min(round(i * step), len(distinct) - 1) for i in range(_SHOWN)})
    return [(distinct[position][1], distinct[position][0]) for position in chosen]


@contextmanager
def _pool() -> Generator[Callable[..., Iterable[Any]]]:
    """Yield a `map` over this machine's processor cores; plain `map` where processes cannot be forked."""
    import multiprocessing
    import os

    cores = min(os.cpu_count() or 1, 8)
    if cores == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield map
        return
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        yield pool.imap


def _unit(experiment: Experiment) -> str:
    kinds = {"example_level": "record", "user_level": "user", "client_level": "site", "none": "none"}
    return kinds[experiment.privacy.kind]


def _print(experiment: Experiment, found: _Forecast) -> None:
    from rich.console import Console
    from rich.markup import escape

    from cli.outlooks import curve_chart, outlook_table, what_if_table
    from cli.tables import epsilon_text

    console = Console(highlight=False)
    if experiment.privacy.kind == "none":
        console.print("[yellow]privacy=none[/yellow]: nothing is protected, there is no noise and no ε")
    console.print(outlook_table(found.outlooks, _unit(experiment)))
    for relation in dict.fromkeys(each.relation for each in found.outlooks if each.relation):
        console.print(f"relation {relation}", soft_wrap=True)
    if len([each for each in found.outlooks if each.label != "federation"]) < found.sites and found.neediest:
        console.print(f"{found.sites} sites in all: one per distinct published count is shown")
    for each in found.problems:
        console.print(f"[red]{escape(each.label)}[/red] {escape(each.problem)}", soft_wrap=True)
        for fix in each.fixes:
            console.print(f"  feasible with {escape(fix)}", soft_wrap=True)
    chart = curve_chart(found.neediest or found.outlooks[0])
    if chart:
        console.print(f"\n{chart}\n")
    if found.neediest is not None and not found.neediest.problem:
        console.print(what_if_table(found.neediest, found.others))
    console.print(
        f"d={found.parameters} trained values"
        if found.parameters is not None
        else "no SNR: the checkpoint is not on this machine, or holds no safetensors",
    )
    if found.neediest is not None and found.groups:
        several = ", ".join(f"{size} records ε={epsilon_text(epsilon)}" for size, epsilon in found.groups)
        console.print(f"a person whose records are protected one by one, at {found.neediest.label}: {several}")
    for warning in _hopeless(found):
        console.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True)
    console.print(_person_line(experiment.federation.sites_per_person, found), soft_wrap=True)
    for runs, told, best in found.searches:
        console.print(
            f"{runs} runs on the same records, to choose settings: ε={epsilon_text(told)} in all; "
            f"ε={epsilon_text(best)} if only the best of a Poisson number of them, mean {runs}, is told"
        )


def _hopeless(found: _Forecast) -> list[str]:
    """Return what is feasible and will probably learn nothing, or promise little; with what would help."""
    from conf.schema.rules import LARGE_DELTA

    told: list[str] = []
    for each in found.outlooks:
        if each.problem:
            continue
        if each.snr_run is not None and each.snr_run < _HOPELESS:
            help_with = "more sites" if each.label == "federation" else "a larger batch, more records"
            told.append(
                f"{each.label}: over the whole run the noise is {1 / each.snr_run:.3g} times the largest possible "
                f"signal; {help_with}, a larger privacy.target_epsilon or a smaller peft.rank would help"
            )
        if each.delta is not None and each.delta > LARGE_DELTA:
            told.append(
                f"{each.label}: δ={each.delta:.2g} is above {LARGE_DELTA:g}, the promise may fail altogether that "
                "often; set a smaller privacy.delta, at the price of more noise"
            )
    return told


def _person_line(several: int, found: _Forecast) -> str:
    from cli.tables import epsilon_text

    if several == 1:
        return "each person is taken to be known at one site; federation.sites_per_person says otherwise"
    whole = next((each.epsilon_person for each in found.outlooks if each.epsilon_person is not None), None)
    figures = [("whole sites", whole), ("what sites protect themselves", found.person)]
    told = ", ".join(f"ε={epsilon_text(epsilon)} ({name})" for name, epsilon in figures if epsilon is not None)
    return f"a person known at up to {several} sites: {told or 'no ε'}"


def _print_json(experiment: Experiment, found: _Forecast) -> None:
    import json
    from dataclasses import asdict

    def plain(outlook: Outlook) -> dict[str, Any]:
        return {key: _finite(value) for key, value in asdict(outlook).items()}

    told = {
        "experiment": experiment.digest,
        "unit": _unit(experiment),
        "sites_in_all": found.sites,
        "trained_values": found.parameters,
        "sites": [plain(each) for each in found.outlooks],
        "what_if": [plain(each) for each in found.others],
        "search": [
            {"runs": runs, "epsilon": _finite(told), "epsilon_of_best": _finite(best)}
            for runs, told, best in found.searches
        ],
        "group": [{"records": size, "epsilon": _finite(epsilon)} for size, epsilon in found.groups],
        "sites_per_person": {"sites": experiment.federation.sites_per_person, "epsilon": _finite(found.person)},
        "warnings": _hopeless(found),
        "feasible": not found.problems,
    }
    typer.echo(json.dumps(told, indent=1, ensure_ascii=False))


def _finite(value: Any) -> Any:
    """Return None for infinity, which JSON does not know: without noise there is no ε, and no ratio."""
    import math

    return None if isinstance(value, float) and not math.isfinite(value) else value
