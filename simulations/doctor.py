"""`cloister doctor`: real rounds at throw-away copies of an experiment's first site, watched from outside.

Nothing in the training code knows that it is watched: records are seen when they are looked up, gradients when the
optimizer is given them (torch's own global hook), the books in the throw-away ledger, the rest in the replies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.trials import dropout_rates
from conf.schema.experiment import Experiment
from conf.schema.privacy import ClientLevel, NoPrivacy, UserLevel
from finetuning.datasets import Row
from privacy.doctor.subject import ObservedRound, Promise, Subject
from privacy.plan import PrivacyPlan
from protocol.errors import ConfigError
from protocol.instructions import client_plan
from protocol.tensors import NamedTensors, add
from simulations.patient import ROUNDS, Patient, admit, rows_of
from simulations.population import site_file
from simulations.probe import draws_of, probe_of
from simulations.watching import StepLog, WatchedSite, frozen_digest, silenced

__all__ = ["observe_site"]

_STARVED = 1000
"""The starved site publishes so many times the expected batch, and has one unit."""
_PRECISION = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}


def observe_site(experiment: Experiment, parts: Mapping[str, Sequence[Row]], scratch: Path) -> Subject:
    """Return what is observed of real rounds at the first of the simulated sites.

    Args:
        experiment: what is to be examined; its data is not read again.
        parts: the records of each site, as `simulations.population` returns them.
        scratch: an empty folder for throw-away ledgers; no budget of anybody is touched.

    Raises:
        CloisterError: what the rounds themselves would raise: data, model, adapter or plan do not fit together.
    """
    patient = admit(experiment, parts, scratch)
    adapted, log = patient.adapted, StepLog()
    hook = register_optimizer_step_pre_hook(log.step)
    try:
        with dropout_rates(adapted.network, 0.0):
            adapted.load(patient.start)
            before = frozen_digest(adapted.network, patient.trained)
            plan, trained = _rounds(patient, "trained", patient.rows, log)
            after = frozen_digest(adapted.network, patient.trained)
            with silenced(adapted.network):
                _, quiet = _rounds(patient, "silenced", rows_of(patient.units[:-1]), log)
            starved = _starved_round(patient, plan, log)
            probe = probe_of(patient, plan)
            draws = draws_of(patient, plan)
    finally:
        hook.remove()
        adapted.network.eval()
    precision = _PRECISION[experiment.model.dtype]
    return Subject(_promise(patient), plan, probe, draws, trained, quiet, starved, before, after, precision)


def _promise(patient: Patient) -> Promise:
    federation, file = patient.experiment.federation, patient.site("trained")
    return Promise(
        privacy=patient.local,
        local=federation.local,
        rounds=federation.rounds,
        published_units=file.published_records if file.published_users is None else file.published_users,
        num_units=len(patient.units),
        update_clip=patient.update_clip,
    )


def _rounds(
    patient: Patient, name: str, rows: Sequence[Row], log: StepLog
) -> tuple[PrivacyPlan, tuple[ObservedRound, ...]]:
    """Return the site's own plan, and its first rounds."""
    # All copies publish what the first site publishes: only what they hold differs.
    site = WatchedSite(patient.site(name), rows, log)
    try:
        plan = site.rehearse(client_plan(patient.experiment, "doctor"))
        observed, adapter = list[ObservedRound](), patient.start
        for number in range(1, ROUNDS + 1):
            one, adapter = _round(site, patient, patient.experiment, number, adapter, log)
            observed.append(one)
        return plan, tuple(observed)
    finally:
        site.close()


def _starved_round(patient: Patient, plan: PrivacyPlan, log: StepLog) -> ObservedRound:
    """Return a round of a site whose draws are empty, nearly always."""
    privacy = patient.local
    if not isinstance(privacy, NoPrivacy):
        # The same noise at another rate, and no search for the noise that this rate would need.
        noise = {"target_epsilon": None, "noise_multiplier": plan.noise_multiplier, "delta": None, "batch_cap": None}
        privacy = privacy.model_copy(update=noise)
    whole = patient.experiment.privacy
    updated = whole.model_copy(update={"local": privacy}) if isinstance(whole, ClientLevel) else privacy
    experiment = patient.experiment.model_copy(update={"privacy": updated})
    published = math.ceil(_STARVED * experiment.federation.local.expected_batch_size)
    users = published if isinstance(privacy, UserLevel) else None
    file = site_file(experiment, patient.name, published, patient.scratch / "starved", users)
    site = WatchedSite(file, patient.units[0], log)
    try:
        return _round(site, patient, experiment, 1, patient.start, log)[0]
    finally:
        site.close()


def _round(
    site: WatchedSite, patient: Patient, experiment: Experiment, number: int, adapter: NamedTensors, log: StepLog
) -> tuple[ObservedRound, NamedTensors]:
    """Return what was seen of one real round, and the adapter after it."""
    instruction = patient.instruction(experiment, number, adapter)
    log.take()
    reply = site.answer(instruction)
    if reply.header.status == "refused":
        raise ConfigError(f"the examined site refuses round {number} ({reply.header.code}): {reply.header.reason}")
    moved = {name: float(tensor.double().norm()) for name, tensor in reply.tensors.items()}
    booked = site.booked(instruction.header.plan.run)
    return ObservedRound(log.take(), reply.header, moved, booked), add(adapter, reply.tensors)
