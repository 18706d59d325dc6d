"""Rounds of a site that has next to nothing to draw from: what it sends is noise, and costs hardly any time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from conf.schema.experiment import Experiment
from conf.schema.privacy import ClientLevel, ExampleLevel, NoPrivacy, Privacy, UserLevel
from conf.schema.site import SiteFile
from privacy.doctor.subject import ObservedRound, Starved
from privacy.ledger.keys import SECRET_FILE
from privacy.plan import PrivacyPlan
from protocol.instructions import ReplyHeader
from protocol.tensors import NamedTensors
from simulations.observing import observed_round
from simulations.patient import Patient
from simulations.population import site_file
from simulations.watching import StepLog, WatchedSite

__all__ = ["starved_rounds"]

_MANY = 1000
"""The starved site publishes so many times the expected batch, and has one unit."""
_ASKED, _ALLOWED = 4, 3
"""Steps per round of the plan, and of the site's own file."""
_ELSEWHERE = 1.01
_SEED = 1


@dataclass(frozen=True, eq=False)
class _Setting:
    patient: Patient
    experiment: Experiment
    log: StepLog

    def site(self, purpose: str) -> WatchedSite:
        patient, experiment = self.patient, self.experiment
        published = math.ceil(_MANY * experiment.federation.local.expected_batch_size)
        users = published if isinstance(patient.local, UserLevel) else None
        file: SiteFile = site_file(experiment, patient.name, published, patient.scratch / purpose, users)
        runtime = file.runtime.model_copy(update={"steps_per_round": _ALLOWED})
        return WatchedSite(file.model_copy(update={"runtime": runtime}), patient.units[0], self.log)

    def single(self, purpose: str, adapter: NamedTensors) -> ObservedRound:
        """Return what was seen of the first round of a site that is opened for it."""
        site = self.site(purpose)
        try:
            return self.round(site, adapter)
        finally:
            site.close()

    def round(self, site: WatchedSite, adapter: NamedTensors) -> ObservedRound:
        return observed_round(site, self.patient, self.experiment, 1, adapter, self.log)[0]


def starved_rounds(patient: Patient, plan: PrivacyPlan, log: StepLog) -> tuple[Starved, Mapping[str, ReplyHeader]]:
    """Return what was seen of the starved site and of its twin, and its answers to plans with repeatable noise.

    Args:
        patient: what is examined; its network is silenced.
        plan: the noise that the starved site uses too, at another rate, so that none is searched for.
        log: what sees the steps.
    """
    setting = _Setting(patient, _at_the_noise_of(plan, patient), log)
    start = patient.start
    site = setting.site("starved")
    try:
        first, repeated = setting.round(site, start), setting.round(site, start)
        refusals = {
            where: _answer(site, patient, setting.experiment, privacy) for where, privacy in _repeatable().items()
        }
    finally:
        site.close()
    _with_secret_of(patient.scratch / "starved", patient.scratch / "set_back")
    # What is not trained follows from the public seed, and is not sent.
    other = {name: _ELSEWHERE * tensor if name in patient.trained else tensor for name, tensor in start.items()}
    elsewhere = setting.single("set_back", other)
    return Starved(_ALLOWED, first, repeated, elsewhere, setting.single("twin", start)), refusals


def _with_secret_of(state: Path, other: Path) -> None:
    """Make a state directory with the secret of another one, and without its ledger: as after a loss of the books."""
    other.mkdir(mode=0o700, parents=True)
    shutil.copy2(state / SECRET_FILE, other / SECRET_FILE)


def _at_the_noise_of(plan: PrivacyPlan, patient: Patient) -> Experiment:
    experiment, privacy = patient.experiment, patient.local
    if not isinstance(privacy, NoPrivacy):
        noise = {"target_epsilon": None, "noise_multiplier": plan.noise_multiplier, "delta": None, "batch_cap": None}
        privacy = privacy.model_copy(update=noise)
    whole = experiment.privacy
    updated = whole.model_copy(update={"local": privacy}) if isinstance(whole, ClientLevel) else privacy
    federation = experiment.federation
    batch = max(min(federation.local.expected_batch_size, plan.normalizer), 1.0)  # a plan may ask for any site's whole
    local = federation.local.model_copy(update={"steps": _ASKED, "expected_batch_size": batch})
    return experiment.model_copy(
        update={"privacy": updated, "federation": federation.model_copy(update={"local": local})}
    )


def _repeatable() -> dict[str, Privacy]:
    """Return a plan with repeatable noise for each place in which a seed can stand."""
    record = ExampleLevel(noise_multiplier=1.0, insecure_seed=_SEED)
    user = UserLevel(noise_multiplier=1.0, insecure_seed=_SEED)
    return {
        "privacy.insecure_seed of example_level": record,
        "privacy.insecure_seed of user_level": user,
        "privacy.insecure_seed of client_level": ClientLevel(noise_multiplier=1.0, insecure_seed=_SEED),
        "privacy.local.insecure_seed of example_level": ClientLevel(noise_multiplier=1.0, local=record),
        "privacy.local.insecure_seed of user_level": ClientLevel(noise_multiplier=1.0, local=user),
    }


def _answer(site: WatchedSite, patient: Patient, experiment: Experiment, privacy: Privacy) -> ReplyHeader:
    asked = experiment.model_copy(update={"privacy": privacy})
    clip_norm = privacy.clip_norm if isinstance(privacy, ClientLevel) else None
    instruction = patient.instruction(asked, 1, patient.start, clip_norm)
    try:
        return site.answer(instruction).header
    except Exception as error:
        # It went on to work on what it should have refused, and failed at that.
        reason = f"{type(error).__name__}: {error}"
        return ReplyHeader(
            status="refused", site=patient.name, round=1, plan_digest="", code="not_refused", reason=reason
        )
