"""`cloister doctor`: real rounds at throw-away copies of an experiment's first site, watched from outside.

Nothing in the training code knows that it is watched: records are seen when they are looked up, gradients when the
optimizer is given them (torch's own global hook), the books in the throw-away ledger, the rest in the replies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.trials import dropout_rates
from conf.schema.experiment import Experiment
from finetuning.rows import Row
from privacy.doctor.subject import ObservedRound, Promise, Subject
from privacy.plan import PrivacyPlan
from protocol.instructions import client_plan
from simulations.observing import fresh_secrets, observed_round
from simulations.patient import ROUNDS, Patient, admit, rows_of
from simulations.probe import cut_draws_of, draws_of, loss_noise_of, probe_of
from simulations.starving import starved_rounds
from simulations.watching import StepLog, WatchedSite, frozen_digest, silenced

__all__ = ["observe_site"]

_LOUD = 1e4
"""A loss beyond any bound, and within what 16 bits hold."""
_CORRECTED = frozenset({"fedprox", "scaffold", "feddyn"})
"""Objectives that add a term to a finished gradient."""
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
            quiet, quiet_plan = _silenced_rounds(patient, plan, log)
            with silenced(adapted.network, log, lambda: 0.0):
                starved, refusals = starved_rounds(patient, plan, log)
            probe = probe_of(patient, plan)
            draws, again = draws_of(patient, plan), draws_of(patient, plan, few=True)
            cut, losses = cut_draws_of(patient, plan), loss_noise_of(patient, plan)
    finally:
        hook.remove()
        adapted.network.eval()
    return Subject(
        promise=_promise(patient),
        plan=plan,
        probe=probe,
        draws=draws,
        draws_again=again,
        cut=cut,
        losses=losses,
        trained=trained,
        silenced=quiet,
        silenced_plan=quiet_plan,
        starved=starved,
        cards=(_card(patient, "trained", patient.rows, log), _card(patient, "silenced", _fewer(patient), log)),
        refusals=refusals,
        secrets=fresh_secrets(scratch),
        base_before=before,
        base_after=after,
        precision=_PRECISION[experiment.model.dtype],
        exact_release=_is_exact(patient),
        dimension=sum(parameter.numel() for parameter in patient.trained.values()),
    )


def _fewer(patient: Patient) -> list[Row]:
    return rows_of(patient.units[:-1])


def _is_exact(patient: Patient) -> bool:
    """Return whether what the optimizer is given is what was noised, divided by a constant, in float32."""
    float32 = all(parameter.dtype == torch.float32 for parameter in patient.trained.values())
    return float32 and patient.experiment.strategy.objective.kind not in _CORRECTED


def _card(patient: Patient, name: str, rows: Sequence[Row], log: StepLog) -> Mapping[str, Any]:
    site = WatchedSite(patient.site(name), rows, log)
    try:
        return site.card()
    finally:
        site.close()


def _silenced_rounds(
    patient: Patient, plan: PrivacyPlan, log: StepLog
) -> tuple[tuple[ObservedRound, ...], PrivacyPlan]:
    """Return rounds of one unit less without any gradient, losses first huge and then not finite; and that site's plan.

    Without noise a loss that is not finite ruins the adapter, and no promise says otherwise.
    """
    losses = iter((_LOUD, math.nan if plan.is_private else _LOUD))
    current = [_LOUD]

    def next_round() -> None:
        current[0] = next(losses)

    with silenced(patient.adapted.network, log, lambda: current[0]):
        quiet_plan, quiet = _rounds(patient, "silenced", _fewer(patient), log, next_round, may_refuse=plan.is_private)
    return quiet, quiet_plan


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
    patient: Patient,
    name: str,
    rows: Sequence[Row],
    log: StepLog,
    before_each: Callable[[], None] = lambda: None,
    *,
    may_refuse: bool = False,
) -> tuple[PrivacyPlan, tuple[ObservedRound, ...]]:
    """Return the site's own plan, and its first rounds."""
    # All copies publish what the first site publishes: only what they hold differs.
    site = WatchedSite(patient.site(name), rows, log)
    try:
        plan = site.rehearse(client_plan(patient.experiment, "doctor"))
        observed, adapter = list[ObservedRound](), patient.start
        for number in range(1, ROUNDS + 1):
            before_each()
            one, adapter = observed_round(
                site, patient, patient.experiment, number, adapter, log, may_refuse=may_refuse
            )
            observed.append(one)
        return plan, tuple(observed)
    finally:
        site.close()
