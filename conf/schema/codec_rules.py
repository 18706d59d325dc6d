"""The support matrix of wire codecs: what each needs of strategies and privacy; `rules.py` lists it with the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conf.schema.objective import FedDyn, Scaffold
from conf.schema.privacy import ClientLevel, adaptive_clipping
from conf.schema.wire import NF4, Lattice, SignSGD, TopK

if TYPE_CHECKING:
    from conf.schema.experiment import Experiment

__all__ = [
    "books_need_exact_updates",
    "errors_that_stay",
    "fed_back_changes_need_a_sum",
    "lattice_clips_as_privacy_does",
    "lattice_clips_in_silence",
    "lattice_holds_the_cohort",
    "lattice_needs_a_sum",
    "secret_cohorts_hold_nothing",
]


def lattice_needs_a_sum(experiment: Experiment) -> str | None:
    """Integers of a lattice are there to be added: a strategy that reads single updates has no use for them."""
    strategy = experiment.strategy
    if not isinstance(experiment.quantization, Lattice) or strategy.is_linear:
        return None
    return f"quantization=lattice needs a strategy that sums updates, not {strategy.kind}; use quantization=eden"


def lattice_holds_the_cohort(experiment: Experiment) -> str | None:
    """A sum of more updates than a lattice is made for wraps around, and each needs at least one level."""
    lattice = experiment.quantization
    if not isinstance(lattice, Lattice):
        return None
    most = 2 ** (lattice.bits - 1) - 1
    if lattice.max_summands > most:
        return (
            f"quantization.max_summands={lattice.max_summands} is above {most}, what quantization.bits={lattice.bits} "
            "can hold; use more bits, or fewer summands"
        )
    population = experiment.data.partition.population
    # A Poisson cohort may be as large as the population.
    poisson = experiment.federation.cohort_sampling == "poisson"
    cohort = population if poisson else experiment.federation.cohort_size or population
    if cohort is None or cohort <= lattice.max_summands:
        return None
    return (
        f"quantization.max_summands={lattice.max_summands} is below the cohort of {cohort} sites, whose sum would wrap "
        f"around; use {cohort} or more"
    )


def lattice_clips_as_privacy_does(experiment: Experiment) -> str | None:
    """A lattice clips to its own norm, in public; under client-level privacy it is the norm that the noise is for."""
    lattice, privacy = experiment.quantization, experiment.privacy
    if not isinstance(lattice, Lattice) or not isinstance(privacy, ClientLevel):
        return None
    if adaptive_clipping(privacy):
        return (
            "quantization=lattice has one step for all rounds, and privacy.clipping.kind=adaptive moves the clip norm; "
            "use clipping.kind=fixed, or quantization=eden"
        )
    if lattice.norm_bound == privacy.clip_norm:
        return None
    return (
        f"quantization.norm_bound={lattice.norm_bound} is not privacy.clip_norm={privacy.clip_norm}; set "
        f"quantization.norm_bound={privacy.clip_norm}"
    )


def fed_back_changes_need_a_sum(experiment: Experiment) -> str | None:
    """What a change of the adapter left out can be added later only while factors keep their meaning."""
    quantization, strategy = experiment.quantization, experiment.strategy
    if not isinstance(quantization, SignSGD | TopK) or not quantization.error_feedback:
        return None
    if quantization.downlink == "none" or strategy.adds:
        return None
    return (
        "quantization.downlink=same with error feedback needs a strategy that sums updates of the same values in every "
        f"round, not {strategy.kind}; use quantization.downlink=none, or quantization=eden"
    )


def secret_cohorts_hold_nothing(experiment: Experiment) -> str | None:
    """Who is sent a change is who trained in the last round: with a secret cohort the server must not store that."""
    if (
        experiment.federation.cohort_sampling != "poisson"
        or getattr(experiment.quantization, "downlink", "none") == "none"
    ):
        return None
    return (
        "quantization.downlink=same keeps a list of who took part, and federation.cohort_sampling=poisson is secret; "
        "use quantization.downlink=none"
    )


def books_need_exact_updates(experiment: Experiment) -> str | None:
    """What a site books of its own update and the server of the decoded one part by a sum of errors, without bound."""
    objective, quantization = experiment.strategy.objective, experiment.quantization
    if not isinstance(objective, Scaffold | FedDyn) or quantization.kind == "none":
        return None
    return (
        f"objective={objective.kind} with quantization={quantization.kind}: a site keeps a sum of its exact updates "
        "and the server one of what it decodes, so that their errors add up and the run ends elsewhere; use "
        "quantization=none, or objective=fedprox or fednova"
    )


def lattice_clips_in_silence(experiment: Experiment) -> str | None:
    """Without client-level privacy nobody asked for the clip norm that a lattice has."""
    lattice = experiment.quantization
    if not isinstance(lattice, Lattice) or isinstance(experiment.privacy, ClientLevel):
        return None
    return (
        f"quantization=lattice clips every update to quantization.norm_bound={lattice.norm_bound}; set it above the "
        "norms of the updates, which a run without quantization reports"
    )


def errors_that_stay(experiment: Experiment) -> str | None:
    """A biased codec without error feedback loses the same part in every round."""
    quantization = experiment.quantization
    lossy = isinstance(quantization, NF4) or (
        isinstance(quantization, SignSGD | TopK) and not quantization.error_feedback
    )
    if not lossy:
        return None
    return (
        f"quantization={quantization.kind} is biased, and nothing feeds its errors back: they do not average out over "
        "sites; eden has fewer bits and no bias"
    )
