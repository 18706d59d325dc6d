"""What was observed of a site's real training code, and what a check says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from conf.schema.federation import LocalTraining
from conf.schema.privacy import LocalPrivacy, NoPrivacy
from privacy.mechanisms import SubsampledGaussian
from privacy.plan import PrivacyPlan
from privacy.sampling import PoissonSampling
from protocol.instructions import ReplyHeader

__all__ = [
    "FALSE_ALARM",
    "CutDraws",
    "ObservedRound",
    "ObservedStep",
    "Probe",
    "Promise",
    "Starved",
    "Subject",
    "Verdict",
]

FALSE_ALARM = 1e-6
"""The chance that a statistical check fails a healthy program, per check."""


@dataclass(frozen=True)
class Verdict:
    """One line of a diagnosis. `passed` is None where the check does not apply to what is promised."""

    name: str
    passed: bool | None
    evidence: str


@dataclass(frozen=True)
class Promise:
    """What was asked for, as the configuration and the site file say it: the plan is judged against this."""

    privacy: LocalPrivacy
    local: LocalTraining
    rounds: int
    published_units: int
    num_units: int
    """The true count of the units that the observed rounds could draw from."""
    update_clip: float | None = None
    """Client-level: the bound on the site's update as a whole; None where nobody promises one."""

    @property
    def expected_batch(self) -> float:
        """Units that a step is to draw on average: what is asked for, or the largest share of a smaller site."""
        return min(self.local.expected_batch_size, self.local.largest_rate * self.published_units)

    @property
    def is_private(self) -> bool:
        """Whether anything is promised at all."""
        return not isinstance(self.privacy, NoPrivacy) or self.update_clip is not None


@dataclass(frozen=True, eq=False)
class Probe:
    """Sums made by the real training code without noise, over a few units, all of them drawn.

    A gradient is one flat float64 vector over all trained parameters, of shape (d,).
    """

    clip_norm: float
    normalizer: float
    """Not the number of units here, so that a division by the actual batch shows."""
    alone: tuple[torch.Tensor, ...]
    """Each unit's own gradient by plain autograd: unpadded, one record at a time, unclipped."""
    whole: torch.Tensor
    """The gradient that the optimizer was given when all units were drawn."""
    without: tuple[torch.Tensor, ...]
    """The same with one unit's records left out of the site's data, for each unit in turn."""
    noised: torch.Tensor | None
    """`whole` once more, with the plan's noise for this clip norm; None where no noise is promised."""


@dataclass(frozen=True, eq=False)
class ObservedStep:
    """One optimizer step: the units whose records were looked up for it, and the gradient that it was given."""

    units: frozenset[int]
    gradient: tuple[torch.Tensor, ...]
    """One float64 tensor per trained parameter, flat."""
    dropout_seed: int
    """What torch's generator was seeded with last: what decides the dropout masks of this step."""


@dataclass(frozen=True, eq=False)
class ObservedRound:
    """One round as the site's owner, its ledger and the server saw it."""

    steps: tuple[ObservedStep, ...]
    header: ReplyHeader
    moved: Mapping[str, float]
    """The L2 norm of the update, per tensor that left the site."""
    booked: tuple[SubsampledGaussian, ...]
    """Everything that the site's ledger holds after the round, in order."""
    update: str
    """The digest of what left."""


@dataclass(frozen=True, eq=False)
class Starved:
    """Rounds of a site with a single unit, almost never drawn, whose own file asks for fewer steps than the plan.

    Its gradients are zero, so all that it sends is noise.
    """

    steps: int
    """What its file allows."""
    first: ObservedRound
    repeated: ObservedRound
    """The same question once more."""
    elsewhere: ObservedRound
    """The same round from another adapter, asked of a site with the same secret that has lost its ledger (with it, it
    would refuse)."""
    twin: ObservedRound
    """The first question at a second site: equal in everything but its state directory, and so its secret."""


@dataclass(frozen=True, eq=False)
class CutDraws:
    """Draws by the real rule under a cap that nearly always cuts, at a site with fewer units than slots."""

    sampling: PoissonSampling
    num_units: int
    draws: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Subject:
    """Everything the checks look at. Built from the real code, by `simulations.doctor`."""

    promise: Promise
    plan: PrivacyPlan
    probe: Probe
    draws: tuple[np.ndarray, ...]
    """Positions drawn by the real gradient rule from a site whose every slot is filled."""
    draws_again: tuple[np.ndarray, ...]
    """The first few draws of a second rule, with randomness of its own."""
    cut: CutDraws | None
    """None where no cap is promised."""
    losses: np.ndarray
    """Empty steps' released losses times the normalizer: noise alone, shape (steps,); empty where none is released."""
    trained: tuple[ObservedRound, ...]
    """Consecutive rounds of one run at one site."""
    silenced: tuple[ObservedRound, ...]
    """The same rounds at a site with one unit less, whose gradients are all zero: in the first because every loss is a
    huge constant, in the second, where anything is promised to records, because none is finite."""
    silenced_plan: PrivacyPlan
    """The plan of the site with one unit less, which publishes the same."""
    starved: Starved
    cards: tuple[Mapping[str, Any], ...]
    """What two sites say of themselves that publish the same and hold different numbers of units; without the key."""
    refusals: Mapping[str, ReplyHeader]
    """The answer to plans with repeatable noise, by where the seed stands."""
    secrets: tuple[bytes, ...]
    """Made in fresh state directories, the program's global random generators being in the same state each time."""
    base_before: str
    base_after: str
    """Digests of everything that must not move."""
    precision: float
    """Relative error that the arithmetic of the base's dtype explains."""
    exact_release: bool
    """Whether the optimizer is given float32 quotients of what was noised, with no term of a local objective added."""
    dimension: int
    """Trained values."""

    @property
    def noise_alone(self) -> tuple[ObservedRound, ...]:
        """The rounds whose gradients are noise and nothing else, each with noise of its own."""
        return (*self.silenced, self.starved.first, self.starved.elsewhere, self.starved.twin)
