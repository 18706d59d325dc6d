"""What executed steps cost, as (ε, δ).

Of several exact or upper bounds the tightest valid one is stated (docs/decisions/0006-accounting.md):

- unsampled Gaussians only: one Gaussian, converted exactly;
- Poisson-sampled Gaussians, batches cut or not: privacy loss distributions, the grid halved until ε stands still;
- any discrete noise among them: Rényi differential privacy for all of them.

Neighbors differ in one slot of a published number of them: it holds a unit, or is empty. Uncut sampling gives that
relation the same pair of distributions as adding or removing a unit, so one composition may hold cut batches and uncut.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, combinations

from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

from privacy.loss_distributions import LOUDEST_SIGNAL, pld_epsilon
from privacy.mechanisms import SubsampledGaussian
from privacy.renyi import renyi_epsilon, renyi_over_sites, renyi_selection_epsilon, zcdp_epsilon
from protocol.errors import PrivacyError

__all__ = [
    "ACCOUNTANT",
    "EXACT_GAUSSIAN",
    "RENYI",
    "accountant_of",
    "epsilon_of",
    "epsilon_over_sites",
    "rdp_epsilon_of",
    "selection_epsilon",
]

ACCOUNTANT = "dp-accounting PLD"
EXACT_GAUSSIAN = "exact Gaussian (Balle and Wang 2018)"
RENYI = "Rényi DP"

_MOST_SUBSETS = 32


def epsilon_of(mechanisms: Iterable[SubsampledGaussian], delta: float, *, group_size: int = 1) -> float:
    """Return the ε at `delta` of all mechanisms composed, on one data set, for `group_size` units together.

    The parameters must have been fixed before the first step; chosen later they need a `RenyiFilter`. No mechanism, or
    none with a step, costs 0. A mechanism without noise costs infinity, and so does one with a noise multiplier below a
    twentieth of the group size.

    Raises:
        PrivacyError: a group size below 1.
    """
    if group_size < 1:
        raise PrivacyError(f"group_size={group_size}: a group has at least 1 unit")
    return _epsilon(_merged(mechanisms), delta, group_size)


def accountant_of(mechanisms: Iterable[SubsampledGaussian]) -> str:
    """Return the name of what computes `epsilon_of` for these mechanisms."""
    merged = _merged(mechanisms)
    if any(mechanism.discrete for mechanism in merged):
        return RENYI
    return EXACT_GAUSSIAN if all(mechanism.sampling_rate == 1 for mechanism in merged) else ACCOUNTANT


def rdp_epsilon_of(mechanisms: Iterable[SubsampledGaussian], delta: float, *, group_size: int = 1) -> float:
    """Return ε by Rényi differential privacy: a second accountant, which shares no mathematics with the first.

    An upper bound on the exact ε, and so what a stated ε must not exceed; 8 to 69 percent looser (q = 0.01).
    """
    return renyi_epsilon(mechanisms, delta, group_size)


def selection_epsilon(
    mechanisms: Iterable[SubsampledGaussian],
    delta: float,
    *,
    mean_trials: float,
    alternatives: Iterable[Iterable[SubsampledGaussian]] = (),
) -> float:
    """Return what a hyperparameter search costs that tells the best of Poisson(`mean_trials`) runs and nothing else.

    Every run executes all of `mechanisms`, and the best is chosen by what they release: a score on private data counts
    among them. The number of runs must be drawn, a fixed one is not covered. Papernot and Steinke 2022 (arXiv
    2110.03620), Theorem 6.

    With `alternatives` each run executes either all of `mechanisms` or all of one alternative, drawn at random by
    probabilities that do not depend on the records: at each order that costs no more than the dearest of them.

    Raises:
        PrivacyError: a mean below 1.
    """
    if not 1 <= mean_trials < math.inf:
        raise PrivacyError(f"mean_trials={mean_trials}: the mean number of runs must be 1 or more, and finite")
    runs = [list(mechanisms), *(list(alternative) for alternative in alternatives)]
    return renyi_selection_epsilon(runs, delta, mean_trials)


def epsilon_over_sites(sites: Sequence[Sequence[SubsampledGaussian]], delta: float, *, overlap: int = 1) -> float:
    """Return what a federation costs a person who is present at no more than `overlap` of its sites.

    One site: the largest ε, never the sum, since the other sites' outputs do not depend on the person. More sites: the
    most that any `overlap` of them cost, composed. Which ones cost the most together cannot be told from each one's ε,
    so all choices are tried, or, where they are too many, the `overlap` largest Rényi costs are added at each order: no
    choice costs more at any order, so no choice costs more.

    Raises:
        PrivacyError: an overlap below 1 or above the number of sites.
    """
    if not 1 <= overlap <= max(1, len(sites)):
        raise PrivacyError(
            f"overlap={overlap}: of {len(sites)} sites a person can be at 1 to {max(1, len(sites))}; lower the overlap"
        )
    # Of sites with one and the same cost no choice holds more than `overlap`.
    counts = Counter(_merged(site) for site in sites)
    plans = [plan for plan, count in counts.items() for _ in range(min(count, overlap))]
    if overlap == 1 or math.comb(len(plans), overlap) <= _MOST_SUBSETS:
        choices = {_merged(chain.from_iterable(chosen)) for chosen in combinations(plans, overlap)}
        return max((_epsilon(choice, delta, 1) for choice in choices), default=0.0)
    return renyi_over_sites(plans, delta, overlap)


def _merged(mechanisms: Iterable[SubsampledGaussian]) -> tuple[SubsampledGaussian, ...]:
    """Return one mechanism per set of parameters, in order of appearance; unsampled Gaussians become one, at the end.

    Steps with the same parameters compose faster together; a history that grows at its end keeps its beginning, which
    the loss distributions remember.
    """
    steps: dict[SubsampledGaussian, int] = {}
    precision = 0.0
    for mechanism in mechanisms:
        if mechanism.steps == 0:
            continue
        if mechanism.sampling_rate == 1 and not mechanism.discrete and mechanism.noise_multiplier > 0:
            precision += mechanism.steps / mechanism.noise_multiplier**2
            continue
        key = mechanism.repeated(1)
        steps[key] = steps.get(key, 0) + mechanism.steps
    unsampled = (SubsampledGaussian(1.0, precision**-0.5, 1),) if precision else ()
    return (*(key.repeated(count) for key, count in steps.items()), *unsampled)


@lru_cache(maxsize=4096)
def _epsilon(merged: tuple[SubsampledGaussian, ...], delta: float, group_size: int) -> float:
    if not merged:
        return 0.0
    if any(mechanism.noise_multiplier == 0 for mechanism in merged):
        return math.inf
    loudest = max(group_size / mechanism.noise_multiplier for mechanism in merged)
    unsampled = all(mechanism.sampling_rate == 1 for mechanism in merged)
    if any(mechanism.discrete for mechanism in merged):
        if unsampled:
            rho = sum(mechanism.steps / (2 * mechanism.noise_multiplier**2) for mechanism in merged)
            return zcdp_epsilon(group_size**2 * rho, delta)
        return renyi_epsilon(merged, delta, group_size)
    if unsampled:
        return get_epsilon_gaussian(1 / loudest, delta)
    return math.inf if loudest > LOUDEST_SIGNAL else pld_epsilon(merged, delta, group_size)
