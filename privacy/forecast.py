"""What a plan will cost and how much of it will be noise, before anything is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conf.schema.federation import Federation, LocalTraining
from conf.schema.privacy import ClientLevel, ExampleLevel, LocalPrivacy, NoPrivacy, UserLevel
from privacy.accounting import epsilon_of, epsilon_over_sites, selection_epsilon
from privacy.calibration import is_reachable
from privacy.client_level import build_client_level_plan
from privacy.mechanisms import SubsampledGaussian
from privacy.plan import PrivacyPlan, build_plan, default_delta
from protocol.errors import PrivacyError

__all__ = [
    "Outlook",
    "Scenario",
    "client_outlook",
    "forecast",
    "group_cost",
    "nearest_feasible",
    "of_rank",
    "person_cost",
    "search_cost",
    "selection_cost",
    "signal_to_noise",
    "variations",
]

_LOUDEST = {"target_epsilon": None, "noise_multiplier": 1000.0}
"""The calibration looks no further."""
_STRIDE, _STRIDES = 1.1, 20


@dataclass(frozen=True)
class Scenario:
    """One site under one setting; all of it public.

    Attributes:
        label: the site's name, or what was changed.
        published: the site's published count of protected units.
        sites: sites whose updates are averaged in a round.
        parameters: trained values, d; None when the model's files are not at hand.
        curve_points: rounds at which ε is computed.
        with_fixes: whether to look for what would make an infeasible scenario feasible.
    """

    label: str
    privacy: LocalPrivacy
    local: LocalTraining
    rounds: int
    published: int
    sites: int = 1
    parameters: int | None = None
    curve_points: int = 6
    with_fixes: bool = True

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.local.steps * self.rounds


@dataclass(frozen=True)
class Outlook:
    """What a scenario comes to. `problem` is empty where it can be done; `fixes` are overrides that make it so."""

    label: str
    published: int
    sampling_rate: float
    steps: int
    noise_multiplier: float | None = None
    delta: float | None = None
    epsilon: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    """Round -> ε of all rounds so far."""
    snr_round: float | None = None
    snr_run: float | None = None
    relation: str = ""
    epsilon_person: float | None = None
    """Of a person who is known at `sites_per_person` sites; of a whole federation only."""
    problem: str = ""
    fixes: tuple[str, ...] = ()


def signal_to_noise(plan: PrivacyPlan, parameters: int, *, sites: int = 1, rounds: int = 1) -> float:
    """Return the most that ‖signal‖ / ‖noise‖ of the averaged update can be, over `rounds` rounds of SGD.

    Each step adds noise of standard deviation σC/B to each of d coordinates, B being the normalizer: a norm of
    σC√d/B, independent between the N = steps·rounds steps and the K sites, so the noise of their mean has norm
    σC√d/B · √(N/K). The signal of a step is at most C, when a batch of the expected size is drawn and every record's
    gradient is as long as the clip norm and points the same way, at all sites: N·C over the steps. The ratio is

        B · √(N·K) / (σ·√d)

    An upper bound: real gradients are shorter and disagree. Dimensions along which nothing is learned carry noise all
    the same, so useful training happens far below a ratio of 1.
    """
    steps = plan.steps_per_round * rounds
    if plan.noise_multiplier == 0:
        return math.inf
    return plan.normalizer * math.sqrt(steps * sites / parameters) / plan.noise_multiplier


def forecast(scenarios: Iterable[Scenario], over: Callable[..., Iterable[Any]] = map) -> list[Outlook]:
    """Return each scenario's outlook, in order.

    Args:
        scenarios: what to look at.
        over: applies a function to each, like `map`; a pool's own `map` uses more processor cores.
    """
    return list(over(_outlook, scenarios))


def _outlook(scenario: Scenario) -> Outlook:
    rate = scenario.local.expected_batch(scenario.published) / scenario.published
    empty = Outlook(scenario.label, scenario.published, rate, scenario.steps)
    try:
        plan = _plan(scenario)
    except PrivacyError as error:
        fixes = nearest_feasible(scenario) if scenario.with_fixes else ()
        return replace(empty, problem=str(error), fixes=fixes)
    curve = tuple(
        (r, plan.epsilon([plan.mechanism(plan.steps_per_round * r)]))
        for r in _rounds(scenario.rounds, scenario.curve_points)
    )

    def snr(rounds: int) -> float | None:
        size, sites = scenario.parameters, scenario.sites
        return None if size is None else signal_to_noise(plan, size, sites=sites, rounds=rounds)

    return replace(
        empty,
        noise_multiplier=plan.noise_multiplier,
        delta=plan.delta,
        epsilon=curve[-1][1],
        curve=curve if plan.is_private else (),
        snr_round=snr(1),
        snr_run=snr(scenario.rounds),
        relation=plan.relation,
    )


def _plan(scenario: Scenario) -> PrivacyPlan:
    published = scenario.published
    return build_plan(
        scenario.privacy, scenario.local, rounds=scenario.rounds, published_units=published, num_units=published
    )


def _rounds(last: int, points: int) -> list[int]:
    """Return up to `points` rounds, evenly spread, with the last (and the first, if there are two or more)."""
    if points == 1:
        return [last]
    return sorted({round(1 + (last - 1) * i / (points - 1)) for i in range(points)})


def nearest_feasible(scenario: Scenario) -> tuple[str, ...]:
    """Return overrides, each of which on its own removes what stops the scenario first; none where nothing does."""
    privacy, published = scenario.privacy, scenario.published
    if isinstance(privacy, NoPrivacy):
        return ()
    if privacy.delta is not None and privacy.delta >= 1 / published:
        return ("privacy.delta=null", f"privacy.delta={default_delta(published):.2g}")
    if privacy.loss_noise_multiplier is not None:
        return (*_louder_loss(scenario), "privacy.loss_noise_multiplier=null")
    if privacy.target_epsilon is None:
        return ()
    return tuple(_reachable(scenario, privacy, privacy.target_epsilon))


def _louder_loss(scenario: Scenario) -> Iterator[str]:
    """Yield ten times the noise of the whole, which leaves the loss one percent of the budget, nearly."""
    try:
        alone = _plan(replace(scenario, privacy=scenario.privacy.model_copy(update={"loss_noise_multiplier": None})))
    except PrivacyError:
        return
    yield f"privacy.loss_noise_multiplier={10 * alone.noise_multiplier:.3g}"


def _reachable(scenario: Scenario, privacy: ExampleLevel | UserLevel, target: float) -> Iterator[str]:
    """Yield a target near the least ε that the steps can cost, and the most rounds that the target allows."""

    loudest = _plan(replace(scenario, privacy=privacy.model_copy(update=_LOUDEST)))
    delta = loudest.delta
    if delta is None:
        return

    def works(target: float, rounds: int) -> bool:
        return is_reachable(target, delta, loudest.mechanism(loudest.steps_per_round * rounds))

    if works(target, scenario.rounds):
        return
    # The calibration gives up a little above what the accountant could reach: go up in small steps until it does not.
    least = loudest.epsilon([loudest.whole_run])
    rounded = (float(f"{least * _STRIDE**step:.3g}") for step in range(1, _STRIDES))
    reachable = next((each for each in rounded if works(each, scenario.rounds)), None)
    if reachable is not None:
        yield f"privacy.target_epsilon={reachable:g}"
    enough, too_many = 0, scenario.rounds
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        enough, too_many = (middle, too_many) if works(target, middle) else (enough, middle)
    if enough:
        yield f"federation.rounds={enough}"


def variations(scenario: Scenario) -> tuple[Scenario, ...]:
    """Return what else could be run: each label is the override that changes the scenario.

    Fewer steps per round are not among them: noise and signal depend on all steps of the run together.
    """
    local, privacy = scenario.local, scenario.privacy
    found: list[Scenario] = []
    for factor in (2, 4):
        batch = local.expected_batch_size * factor
        if batch <= local.largest_rate * scenario.published:
            bigger = local.model_copy(update={"expected_batch_size": batch})
            found.append(replace(scenario, label=f"federation.local.expected_batch_size={batch:g}", local=bigger))
    if scenario.rounds > 1:
        half = scenario.rounds // 2
        found.append(replace(scenario, label=f"federation.rounds={half}", rounds=half))
    if not isinstance(privacy, NoPrivacy) and privacy.target_epsilon is not None:
        half = privacy.target_epsilon / 2
        stricter = privacy.model_copy(update={"target_epsilon": half})
        found.append(replace(scenario, label=f"privacy.target_epsilon={half:g}", privacy=stricter))
    return tuple(replace(each, curve_points=1, with_fixes=False) for each in found)


def of_rank(outlook: Outlook, rank: int, parameters: int | None, smaller: int | None) -> Outlook:
    """Return the outlook of an adapter with `smaller` trained values instead of `parameters`: the price is the same."""
    scale = math.nan if not parameters or not smaller else math.sqrt(parameters / smaller)

    def scaled(ratio: float | None) -> float | None:
        return None if ratio is None or math.isnan(scale) else ratio * scale

    label = f"peft.rank={rank}"
    return replace(outlook, label=label, snr_round=scaled(outlook.snr_round), snr_run=scaled(outlook.snr_run))


def search_cost(scenario: Scenario, outlook: Outlook, runs: int) -> float:
    """Return the ε of `runs` runs on the same records: trying settings is training, and each try is spent.

    `outlook` is the scenario's own; its noise is not searched for again.
    """
    run, delta = _priced(scenario, outlook)
    return epsilon_of([run.repeated(run.steps * runs)], delta)


def selection_cost(scenario: Scenario, outlook: Outlook, mean_runs: float) -> float:
    """Return the ε of a search that tells the best of Poisson(`mean_runs`) runs and nothing else (arXiv 2110.03620).

    Every score that the choice rests on must itself be private, and be charged.
    """
    run, delta = _priced(scenario, outlook)
    return selection_epsilon([run], delta, mean_trials=mean_runs)


def group_cost(scenario: Scenario, outlook: Outlook, size: int) -> float:
    """Return the ε of `size` units together, at the same δ: of a person whose records are protected one by one."""
    run, delta = _priced(scenario, outlook)
    return epsilon_of([run], delta, group_size=size)


def person_cost(sites: Sequence[tuple[Scenario, Outlook, int]], several: int) -> float:
    """Return the ε of a person who is known at up to `several` sites, at the largest δ of any.

    Args:
        sites: each feasible scenario with its outlook, and how many sites are like it.
        several: at least 1.
    """
    priced = [(*_priced(scenario, outlook), count) for scenario, outlook, count in sites]
    executed = [[run] for run, _, count in priced for _ in range(min(count, several))]
    return epsilon_over_sites(executed, max(delta for _, delta, _ in priced), overlap=min(several, len(executed)))


def _priced(scenario: Scenario, outlook: Outlook) -> tuple[SubsampledGaussian, float]:
    """Return the whole run and its δ, with the noise that the outlook has found."""
    known = {"target_epsilon": None, "noise_multiplier": outlook.noise_multiplier}
    plan = _plan(replace(scenario, privacy=scenario.privacy.model_copy(update=known)))
    if plan.delta is None:
        raise ValueError("nothing is promised, so nothing has a price")
    return plan.whole_run, plan.delta


def client_outlook(
    privacy: ClientLevel, federation: Federation, weights: Mapping[str, float], parameters: int | None
) -> Outlook:
    """Return the federation's one line when the unit is a whole site.

    A round's sum of clipped, weighted updates is at most W·C long for a cohort of weight W, and its noise has the
    plan's scale s: over R rounds the signal-to-noise ratio is at most R·W·C / (s·√(v·d)), v being the variance of the
    noise on the last prefix sum (v = R where noise is independent).
    """
    line = Outlook("federation", len(weights), 1.0, federation.rounds)
    try:
        plan = build_client_level_plan(privacy, federation, weights)
    except PrivacyError as error:
        return replace(line, problem=str(error), fixes=tuple(_client_fixes(privacy, federation, weights)))
    rounds = federation.rounds
    # Correlated noise is one mechanism, charged whole before the first round.
    told = [rounds] if plan.participation is not None else _rounds(rounds, 6)
    one = plan.whole_run.repeated(1)
    curve = tuple((r, plan.epsilon([one.repeated(r if plan.participation is None else 1)])) for r in told)

    def snr(of: int) -> float | None:
        if parameters is None:
            return None
        noise = plan.noise_scale(1.0) * math.sqrt(float(plan.factorization.prefix_variances(of)[-1]) * parameters)
        return of * plan.normalizer / noise

    return replace(
        line,
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.update_noise_multiplier,
        delta=plan.delta,
        epsilon=curve[-1][1],
        curve=curve,
        snr_round=snr(1),
        snr_run=snr(rounds),
        relation=plan.relation,
        epsilon_person=epsilon_of([plan.whole_run], plan.delta, group_size=federation.sites_per_person),
    )


def _client_fixes(privacy: ClientLevel, federation: Federation, weights: Mapping[str, float]) -> Iterator[str]:
    """Yield the overrides that help; where none does, the problem's own words say what to do."""
    changes = {
        "privacy.delta=null": (privacy.model_copy(update={"delta": None}), federation),
        "federation.rounds=1": (privacy, federation.model_copy(update={"rounds": 1})),
    }
    for override, (asked, rounds) in changes.items():
        try:
            build_client_level_plan(asked, rounds, weights)
        except PrivacyError:
            continue
        yield override
