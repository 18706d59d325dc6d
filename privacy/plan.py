"""One frozen object from which a site's sampling, clipping, noise and accounting all come, so they cannot disagree."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from conf.schema.federation import LocalTraining
from conf.schema.privacy import ExampleLevel, NoPrivacy
from privacy.accounting import ACCOUNTANT, SubsampledGaussian, epsilon_of
from privacy.calibration import calibrate_noise
from privacy.noise import GaussianNoise
from privacy.sampling import PoissonSampling
from protocol.errors import PrivacyError

__all__ = ["DELTA_MARGIN", "PrivacyPlan", "build_plan", "default_delta"]

DELTA_MARGIN = 10
"""The default δ is 1 / (DELTA_MARGIN x published records)."""


@dataclass(frozen=True)
class PrivacyPlan:
    """What a site does to its gradients, and what that costs.

    Every field is public. `normalizer` divides the noised sum: a constant of the plan, never the drawn batch's size.
    """

    unit: str
    relation: str
    sampling: PoissonSampling
    clip_norm: float
    noise_multiplier: float
    normalizer: float
    steps_per_round: int
    rounds: int
    delta: float | None

    @property
    def is_private(self) -> bool:
        """Whether anything is promised."""
        return self.delta is not None

    @property
    def accountant(self) -> str:
        """Who computed the ε of this plan."""
        return ACCOUNTANT if self.is_private else "none"

    @property
    def noise(self) -> GaussianNoise:
        """The noise, scaled by the sensitivity that the clip fixes."""
        return GaussianNoise(self.noise_multiplier, self.clip_norm if self.is_private else 0.0)

    def mechanism(self, steps: int) -> SubsampledGaussian:
        """Return what executing `steps` steps of this plan amounts to, for the accountant and the ledger."""
        return SubsampledGaussian(self.sampling.rate, self.noise_multiplier, steps)

    def epsilon(self, mechanisms: Iterable[SubsampledGaussian]) -> float:
        """Return the ε of executed mechanisms at this plan's δ; infinity where nothing is promised."""
        return math.inf if self.delta is None else epsilon_of(mechanisms, self.delta)


def build_plan(
    privacy: ExampleLevel | NoPrivacy,
    local: LocalTraining,
    *,
    rounds: int,
    published_records: int,
    num_records: int,
    site_delta: float | None = None,
) -> PrivacyPlan:
    """Return a site's plan for a whole run of `rounds` rounds.

    Args:
        privacy: what is asked for.
        local: steps per round and expected batch size, public constants.
        rounds: rounds of the run; the noise is calibrated for all of them together.
        published_records: the record count the site publishes; the sampling rate follows from it.
        num_records: the true count, a secret; used only to refuse a δ that is too large.
        site_delta: the δ of the site's own budget, at which everything is accounted; the plan may ask for the same or
            a larger one.

    Raises:
        PrivacyError: a sampling rate above 1, δ of 1/n or more, or a budget too small for a single step.
    """
    sampling = PoissonSampling(local.expected_batch_size / published_records)
    if isinstance(privacy, NoPrivacy):
        return PrivacyPlan(
            unit="none",
            relation="nothing is protected",
            sampling=sampling,
            clip_norm=math.inf,
            noise_multiplier=0.0,
            normalizer=local.expected_batch_size,
            steps_per_round=local.steps,
            rounds=rounds,
            delta=None,
        )
    delta = _agreed_delta(privacy.delta, site_delta, published_records, num_records)
    return PrivacyPlan(
        unit="one record",
        relation="add or remove one record of a site",
        sampling=sampling,
        clip_norm=privacy.clip_norm,
        noise_multiplier=_noise_multiplier(privacy, delta, sampling.rate, local.steps, rounds),
        normalizer=local.expected_batch_size,
        steps_per_round=local.steps,
        rounds=rounds,
        delta=delta,
    )


def _agreed_delta(asked: float | None, site_delta: float | None, published_records: int, num_records: int) -> float:
    """Return the one δ of the plan, its ledger and its statements: the site's own, where it has a budget."""
    delta = site_delta if site_delta is not None else asked if asked is not None else default_delta(published_records)
    # First what does not depend on the plan: refusing by what is asked would let a server search for n.
    _refuse_large_delta(delta, min(published_records, num_records))
    if asked is not None and asked < delta:
        raise PrivacyError(
            f"privacy.delta={asked:.3g} is below the δ={delta:.3g} at which this site keeps its budget; "
            f"ask for {delta:.3g} or more, or null"
        )
    return delta


def default_delta(published_records: int) -> float:
    """Return 1 / (10 n): a tenth of what would let a mechanism publish one record in the clear."""
    return 1 / (DELTA_MARGIN * published_records)


def _noise_multiplier(privacy: ExampleLevel, delta: float, rate: float, steps_per_round: int, rounds: int) -> float:
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    if privacy.target_epsilon is None:
        raise PrivacyError("give privacy.target_epsilon or privacy.noise_multiplier; neither is set")
    return calibrate_noise(privacy.target_epsilon, delta, rate, steps_per_round * rounds)


def _refuse_large_delta(delta: float, num_records: int) -> None:
    bound = 1 / num_records
    if delta >= bound:
        # The bound tells the record count, so it may reach only the site's own operator.
        raise PrivacyError(
            f"δ={delta:.3g} (privacy.delta, or budget.delta of a site file) is not below 1/n={bound:.3g} of this "
            f"site's {num_records} records: publishing one record in the clear would keep such a promise; use at most "
            f"{bound / DELTA_MARGIN:.2g}, or null"
        )
