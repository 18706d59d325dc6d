"""One frozen object from which a site's sampling, clipping, noise and accounting all come, so they cannot disagree."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from conf.schema.federation import LocalTraining
from conf.schema.privacy import ExampleLevel, LocalPrivacy, NoPrivacy, UserLevel
from privacy.accounting import accountant_of, epsilon_of
from privacy.calibration import calibrate_noise
from privacy.mechanisms import SubsampledGaussian
from privacy.sampling import PoissonSampling
from protocol.errors import PrivacyError

if TYPE_CHECKING:
    from privacy.noise import Noise

__all__ = ["DELTA_MARGIN", "LossRelease", "PrivacyPlan", "Unit", "build_plan", "default_delta", "relation_of"]

DELTA_MARGIN = 10
"""The default δ is 1 / (DELTA_MARGIN x published units)."""

Unit = Literal["none", "record", "user", "site"]

_RELATIONS = {
    "record": "add or remove one record of a site, in one of its published slots",
    "user": "add or remove one user of a site, with all of the user's records, in one of its published slots",
    "site": "add or remove all updates of one enrolled site",
}


@dataclass(frozen=True)
class LossRelease:
    """The mean training loss of a round, released with noise: each unit's loss is bounded to [0, clip]."""

    noise_multiplier: float
    clip: float


@dataclass(frozen=True)
class PrivacyPlan:
    """What a site does to its gradients, and what that costs.

    Every field is public. `normalizer` divides the noised sum: a constant of the plan, never the drawn batch's size.
    """

    unit: Unit
    relation: str
    sampling: PoissonSampling
    clip_norm: float
    noise_multiplier: float
    normalizer: float
    steps_per_round: int
    rounds: int
    delta: float | None
    discrete: bool = False
    loss: LossRelease | None = None

    @property
    def is_private(self) -> bool:
        """Whether anything is promised."""
        return self.delta is not None

    @property
    def accountant(self) -> str:
        """Who computed the ε of this plan."""
        return accountant_of([self.whole_run]) if self.is_private else "none"

    def noise(self, dimension: int) -> Noise:
        """Return the noise for sums of `dimension` coordinates, scaled by the sensitivity that the clip fixes."""
        # Imported here: a plan is made for `cloister plan` too, which has no use for torch and its seconds.
        from privacy.discrete import DiscreteNoise
        from privacy.noise import GaussianNoise

        if self.discrete:
            return DiscreteNoise(self.noise_multiplier, self.clip_norm, dimension)
        return GaussianNoise(self.noise_multiplier, self.clip_norm if self.is_private else 0.0)

    def mechanism(self, steps: int) -> SubsampledGaussian:
        """Return what executing `steps` steps of this plan amounts to, for the accountant and the ledger.

        Gradient and loss are two Gaussian releases of the same sample, together one Gaussian release: the squares of
        their inverse noise multipliers add up.
        """
        noise = self.noise_multiplier
        if self.loss is not None:
            noise = (noise**-2 + self.loss.noise_multiplier**-2) ** -0.5
        return SubsampledGaussian(self.sampling.rate, noise, steps, self.sampling.truncation, self.discrete)

    @property
    def whole_run(self) -> SubsampledGaussian:
        """All steps of all rounds: the schedule that is declared before the run."""
        return self.mechanism(self.steps_per_round * self.rounds)

    def epsilon(self, mechanisms: Iterable[SubsampledGaussian]) -> float:
        """Return the ε of executed mechanisms at this plan's δ; infinity where nothing is promised."""
        return math.inf if self.delta is None else epsilon_of(mechanisms, self.delta)


def build_plan(
    privacy: LocalPrivacy,
    local: LocalTraining,
    *,
    rounds: int,
    published_units: int,
    num_units: int,
    site_delta: float | None = None,
) -> PrivacyPlan:
    """Return a site's plan for a whole run of `rounds` rounds.

    Args:
        privacy: what is asked for.
        local: steps per round and expected batch size (in units), public constants.
        rounds: rounds of the run; the noise is calibrated for all of them together.
        published_units: the count of records (or users) that the site publishes; the sampling rate follows from it.
        num_units: the true count, a secret; used only to refuse a δ that is too large, or too few slots.
        site_delta: the δ of the site's own budget, at which everything is accounted; the plan may ask for the same or
            a larger one.

    Raises:
        PrivacyError: δ of 1/n or more, fewer slots than units, or a budget too small for a
            single step.
    """
    batch = local.expected_batch(published_units)
    rate = batch / published_units
    if isinstance(privacy, NoPrivacy):
        return PrivacyPlan(
            unit="none",
            relation="nothing is protected",
            sampling=PoissonSampling(rate, max(published_units, num_units)),
            clip_norm=math.inf,
            noise_multiplier=0.0,
            normalizer=batch,
            steps_per_round=local.steps,
            rounds=rounds,
            delta=None,
        )
    cap = None if privacy.batch_cap is None else math.ceil(privacy.batch_cap * batch)
    sampling = PoissonSampling(rate, published_units, cap)
    _refuse_too_few_slots(published_units, num_units)
    delta = _agreed_delta(privacy.delta, site_delta, published_units, num_units)
    loss = None
    if privacy.loss_noise_multiplier is not None:
        loss = LossRelease(privacy.loss_noise_multiplier, privacy.loss_clip)
    unit: Unit = "user" if isinstance(privacy, UserLevel) else "record"
    return PrivacyPlan(
        unit=unit,
        relation=relation_of(unit),
        sampling=sampling,
        clip_norm=privacy.clip_norm,
        noise_multiplier=_noise_multiplier(privacy, delta, sampling, local.steps * rounds, loss),
        normalizer=batch,
        steps_per_round=local.steps,
        rounds=rounds,
        delta=delta,
        discrete=privacy.noise == "discrete",
        loss=loss,
    )


def _refuse_too_few_slots(published: int, num_units: int) -> None:
    if num_units > published:
        # Units without a slot would move up when another is removed, and be drawn in its stead.
        raise PrivacyError(
            f"this site has {num_units} units and publishes a count of {published}: each needs a slot of its own; "
            f"raise published_records (or published_users) of the site file to {num_units} or more"
        )


def relation_of(unit: str) -> str:
    """Return which two data sets an ε per `unit` makes hard to tell apart.

    A site that holds as many units as it publishes takes no further one, and what is drawn are slots: so neighbors
    differ in one slot, filled or empty, whether or not a batch is cut (docs/decisions/0006-accounting.md).
    """
    return _RELATIONS.get(unit, f"add or remove one {unit}")


def _agreed_delta(asked: float | None, site_delta: float | None, published: int, num_units: int) -> float:
    """Return the one δ of the plan, its ledger and its statements: the site's own, where it has a budget."""
    delta = site_delta if site_delta is not None else asked if asked is not None else default_delta(published)
    # First what does not depend on the plan: refusing by what is asked would let a server search for n.
    _refuse_large_delta(delta, min(published, num_units))
    if asked is not None and asked < delta:
        raise PrivacyError(
            f"privacy.delta={asked:.3g} is below the δ={delta:.3g} at which this site keeps its budget; "
            f"ask for {delta:.3g} or more, or null"
        )
    return delta


def default_delta(published_units: int) -> float:
    """Return 1 / (10 n): a tenth of what would let a mechanism publish one record in the clear."""
    return 1 / (DELTA_MARGIN * published_units)


def _noise_multiplier(
    privacy: ExampleLevel | UserLevel, delta: float, sampling: PoissonSampling, steps: int, loss: LossRelease | None
) -> float:
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    if privacy.target_epsilon is None:
        raise PrivacyError("give privacy.target_epsilon or privacy.noise_multiplier; neither is set")
    whole = SubsampledGaussian(sampling.rate, 1.0, steps, sampling.truncation, privacy.noise == "discrete")
    together = calibrate_noise(privacy.target_epsilon, delta, whole)
    if loss is None:
        return together
    if loss.noise_multiplier <= together:
        raise PrivacyError(
            f"privacy.loss_noise_multiplier={loss.noise_multiplier:g} would spend the whole ε on the released loss: "
            f"gradient and loss together need {together:.3g}; use more than that (10 x is cheap), or null"
        )
    return (together**-2 - loss.noise_multiplier**-2) ** -0.5


def _refuse_large_delta(delta: float, num_units: int) -> None:
    bound = 1 / num_units
    if delta >= bound:
        # The bound tells the count, so it may reach only the site's own operator.
        raise PrivacyError(
            f"δ={delta:.3g} (privacy.delta, or budget.delta of a site file) is not below 1/n={bound:.3g} of this "
            f"site's {num_units} records: publishing one record in the clear would keep such a promise; use at most "
            f"{bound / DELTA_MARGIN:.2g}, or null"
        )
