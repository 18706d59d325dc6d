"""Client-level privacy: the unit is a whole site, and the server, which is trusted to do so, adds the noise.

McMahan et al. 2018 (arXiv 1710.06963): each site clips its update; the server sums, adds Gaussian noise scaled by what
one site can change, and divides by a public constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.schema.federation import Federation
from conf.schema.privacy import AdaptiveClip, ClientLevel, IndependentNoise
from privacy.accounting import epsilon_of
from privacy.adaptive_clip import update_noise_multiplier
from privacy.calibration import calibrate_noise
from privacy.correlated.build import INDEPENDENT, build_factorization
from privacy.correlated.factorization import Factorization
from privacy.correlated.participation import Participation
from privacy.mechanisms import SubsampledGaussian
from privacy.plan import default_delta, relation_of
from protocol.errors import PrivacyError

if TYPE_CHECKING:
    import torch

    from privacy.noise import GaussianNoise
    from protocol.tensors import NamedTensors

__all__ = ["ClientLevelPlan", "bounded_weights", "build_client_level_plan", "clip_update", "update_norm"]


@dataclass(frozen=True)
class ClientLevelPlan:
    """What the server does to the sum of updates, and what that costs. Every field is public."""

    relation: str
    rounds: int
    population: int
    sampling_rate: float
    """What is booked: a secret Poisson cohort's rate, else 1, because a known cohort amplifies nothing."""
    secret_cohort: bool
    expected_sites: float
    """Expected size of a cohort."""
    weights: Mapping[str, float]
    """Of every enrolled site."""
    clip_norm: float
    """Of the first round; of every round unless `adaptive`."""
    noise_multiplier: float
    """Of everything that one round releases; of everything the run releases where the noise is correlated."""
    delta: float
    adaptive: AdaptiveClip | None
    participation: Participation | None
    """The limits that correlated noise needs; None for independent noise."""
    factorization: Factorization
    sensitivity: float
    """Of the factorization, for a site that changes each of its rounds by at most 1."""

    @property
    def normalizer(self) -> float:
        """Expected total weight of a cohort: divides the noised sum, whoever replied."""
        return self.expected_sites / self.population * math.fsum(self.weights.values())

    @property
    def max_weight(self) -> float:
        """The largest weight of any site; a public constant, as the weights are."""
        return max(self.weights.values())

    @property
    def update_noise_multiplier(self) -> float:
        """The noise multiplier of the summed updates: larger than the joint one where a count is released besides."""
        if self.adaptive is None:
            return self.noise_multiplier
        return update_noise_multiplier(self.noise_multiplier, self.adaptive.count_noise)

    def noise_scale(self, clip_norm: float) -> float:
        """Return the standard deviation of z in C x + z, per coordinate."""
        return self.update_noise_multiplier * self.sensitivity * clip_norm * self.max_weight

    def noise(self, clip_norm: float) -> GaussianNoise:
        """Return the noise on z of C x + z: one site changes a round's sum by at most `clip_norm` x `max_weight`."""
        # Imported here: `cloister plan` makes plans, and has no use for torch and its seconds.
        from privacy.noise import GaussianNoise

        return GaussianNoise(self.update_noise_multiplier, self.sensitivity * clip_norm * self.max_weight)

    def mechanism(self, round_number: int) -> SubsampledGaussian:
        """Return what is booked before a round, from 1.

        Correlated noise is one mechanism, booked whole before round 1; later rounds book no further step.
        """
        steps = 0 if self.participation is not None and round_number > 1 else 1
        return SubsampledGaussian(self.sampling_rate, self.noise_multiplier, steps)

    def executed(self, rounds: int) -> SubsampledGaussian:
        """Return everything that the first `rounds` rounds release, 1 or more."""
        steps = rounds if self.participation is None else 1
        return SubsampledGaussian(self.sampling_rate, self.noise_multiplier, steps)

    @property
    def whole_run(self) -> SubsampledGaussian:
        """Everything the run releases."""
        return self.executed(self.rounds)

    def epsilon(self, mechanisms: Iterable[SubsampledGaussian]) -> float:
        """Return the ε of executed mechanisms at this plan's δ."""
        return epsilon_of(mechanisms, self.delta)


def build_client_level_plan(
    privacy: ClientLevel, federation: Federation, weights: Mapping[str, float]
) -> ClientLevelPlan:
    """Return the plan of a whole run.

    Args:
        privacy: what is asked for.
        federation: rounds, and how cohorts are chosen.
        weights: of every enrolled site, as `bounded_weights` returns them; names and weights are public.

    Raises:
        PrivacyError: δ of 1/sites or more, a schedule that the participation limits do not allow, or a count whose
            noise spends the whole budget.
    """
    population = len(weights)
    cohort = population if federation.cohort_size is None else federation.cohort_size
    secret = federation.cohort_sampling == "poisson"
    delta = default_delta(population) if privacy.delta is None else privacy.delta
    if delta >= 1 / population:
        raise PrivacyError(
            f"privacy.delta={delta:.3g} is not below 1/{population} sites: publishing one site's update in the clear "
            f"would keep such a promise; use at most {default_delta(population):.2g}, or null"
        )
    participation, factorization, sensitivity = None, INDEPENDENT, 1.0
    if not isinstance(privacy.noise, IndependentNoise):
        limits = privacy.noise
        participation = Participation.in_rotation(
            federation.rounds, population, cohort, limits.min_separation, limits.max_participations
        )
        participation.refuse_impossible(population, cohort)
        factorization = build_factorization(limits, participation)
        sensitivity = factorization.sensitivity(participation)
    rate = cohort / population if secret else 1.0
    plan = ClientLevelPlan(
        relation=_relation(secret, rate, participation),
        rounds=federation.rounds,
        population=population,
        sampling_rate=rate,
        secret_cohort=secret,
        expected_sites=cohort,
        weights=weights,
        clip_norm=privacy.clip_norm,
        noise_multiplier=_noise_multiplier(privacy, delta, rate, federation.rounds if participation is None else 1),
        delta=delta,
        adaptive=privacy.clipping if isinstance(privacy.clipping, AdaptiveClip) else None,
        participation=participation,
        factorization=factorization,
        sensitivity=sensitivity,
    )
    _ = plan.update_noise_multiplier  # refuses a count that is too exact, before anything is spent
    return plan


def bounded_weights(published_records: Mapping[str, int], kind: str, max_weight: float) -> dict[str, float]:
    """Return each site's weight: 1, or its published count over the mean count, at most `max_weight`.

    Enrollment and counts are public, so the weights are public constants; the noise grows with the largest of them.
    """
    if kind == "uniform":
        return dict.fromkeys(published_records, 1.0)
    mean = math.fsum(published_records.values()) / len(published_records)
    return {site: min(count / mean, max_weight) for site, count in published_records.items()}


def clip_update(update: NamedTensors, clip_norm: float) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the update scaled down to an L2 norm of at most `clip_norm`, and whether nothing had to be done.

    The site's last step on real values. An update of zeros stays one.

    Args:
        update: float32 tensors; the norm is over all of them together.
        clip_norm: the bound.

    Raises:
        PrivacyError: the update holds NaN or infinity, or its norm is beyond float64.
    """
    norm = update_norm(update)
    if not math.isfinite(norm):
        raise PrivacyError(
            "the update is not finite and cannot be clipped: lower federation.local.optimizer.learning_rate"
        )
    if norm <= clip_norm:
        return dict(update), True
    factor = clip_norm / norm
    return {name: (tensor.double() * factor).float() for name, tensor in update.items()}, False


def update_norm(update: NamedTensors) -> float:
    """Return the L2 norm over all tensors together, computed in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))


def _noise_multiplier(privacy: ClientLevel, delta: float, rate: float, steps: int) -> float:
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    if privacy.target_epsilon is None:
        raise PrivacyError("give privacy.target_epsilon or privacy.noise_multiplier; neither is set")
    return calibrate_noise(privacy.target_epsilon, delta, SubsampledGaussian(rate, 1.0, steps))


def _relation(secret_cohort: bool, rate: float, participation: Participation | None) -> str:
    unit = f"{relation_of('site')}, the server being trusted to add the noise"
    if secret_cohort:
        return (
            f"{unit}; each round asks a site with probability {rate:.4g}, in secret, which amplifies nothing against "
            "the server, which knows the cohort"
        )
    if participation is None:
        return f"{unit}; who is asked may be known, in every round"
    return (
        f"{unit}; who is asked may be known, each site at most {participation.max_participations} times, "
        f"{participation.min_separation} or more rounds apart"
    )
