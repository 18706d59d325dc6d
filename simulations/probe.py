"""Sums over a few units by the real training code: without noise, everybody drawn. And the real sampler's draws."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.rounds import SiteRecords
from client.site import Site
from client.training import TrainingJob, longest_record, round_rule, train
from conf.schema.privacy import UserLevel
from finetuning.batches import collate
from finetuning.rows import Row
from finetuning.tasks.build import build_objective
from privacy.doctor.subject import CutDraws, Probe
from privacy.gradients import GradientRule
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream
from privacy.sampling import PoissonSampling
from simulations.patient import Patient, rows_of
from simulations.watching import gradient_of
from strategies.averaging import plain_round

__all__ = ["cut_draws_of", "draws_of", "loss_noise_of", "probe_of"]

_PROBED = 6
"""Units whose removal is tried."""
_NORMALIZER = 7.0
_KEY = b"the doctor's own"
_DRAWS, _SLOTS_DRAWN = 2000, 40_000_000
_FEW, _CUT = 50, 500
_LOSSES, _VALUES_DRAWN = 500, 20_000_000


def probe_of(patient: Patient, plan: PrivacyPlan) -> Probe:
    """Return sums over a few units by the real loop and rule, without noise, all drawn."""
    # Few enough records of each user that none is left out: which are is a choice, and no part of the sum.
    most = patient.local.max_records_per_user if isinstance(patient.local, UserLevel) else None
    units = [unit[:most] for unit in patient.units[:_PROBED]]
    alone = tuple(_alone(patient, unit) for unit in units)
    # Most units are longer than this, some shorter.
    norms = sorted(float(gradient.norm()) for gradient in alone)
    clip_norm = norms[len(norms) // 4] * 0.999 if plan.is_private else math.inf
    probing = replace(
        plan,
        clip_norm=clip_norm,
        noise_multiplier=0.0,
        normalizer=_NORMALIZER,
        discrete=False,
        loss=None,
        steps_per_round=1,
    )
    whole = _released(patient, probing, rows_of(units))
    without = tuple(
        _released(patient, probing, rows_of([*units[:left], *units[left + 1 :]])) for left in range(len(units))
    )
    noised = None
    if plan.is_private:
        noising = replace(probing, noise_multiplier=plan.noise_multiplier, discrete=plan.discrete)
        noised = _released(patient, noising, rows_of(units))
    return Probe(clip_norm, _NORMALIZER, alone, whole, without, noised)


def draws_of(patient: Patient, plan: PrivacyPlan, *, few: bool = False) -> tuple[np.ndarray, ...]:
    """Return what the real rule draws from a site whose slots are all filled."""
    slots = plan.sampling.slots
    count = int(min(max(_SLOTS_DRAWN / slots, 200), _DRAWS))
    return _drawn(patient, plan, slots, _FEW if few else count)


def cut_draws_of(patient: Patient, plan: PrivacyPlan) -> CutDraws | None:
    """Return draws under a cap of half the expected batch, where half of the slots are filled; None without a cap."""
    if plan.sampling.cap is None:
        return None
    slots = plan.sampling.slots
    sampling = replace(plan.sampling, cap=max(1, int(plan.sampling.rate * slots / 2)))
    filled = max(1, slots // 2)
    count = int(min(max(_SLOTS_DRAWN / slots, 200), _CUT))
    return CutDraws(sampling, filled, _drawn(patient, replace(plan, sampling=sampling), filled, count))


def loss_noise_of(patient: Patient, plan: PrivacyPlan) -> np.ndarray:
    """Return what the real rule adds to the sum of the losses in empty steps, shape (steps,)."""
    if plan.loss is None:
        return np.empty(0)
    trained = list(patient.trained.values())
    count = int(min(max(_VALUES_DRAWN / sum(each.numel() for each in trained), 50), _LOSSES))
    totals = [0.0]
    with _rule(patient, plan) as rule:
        for taken in range(1, count + 1):
            rule.finish()
            totals.append((rule.released_loss or 0.0) * taken)
    for parameter in trained:
        parameter.grad = None
    return np.diff(totals) * plan.normalizer


def _drawn(patient: Patient, plan: PrivacyPlan, num_units: int, count: int) -> tuple[np.ndarray, ...]:
    with _rule(patient, plan) as rule:
        return tuple(np.asarray(rule.draw(num_units), dtype=np.int64) for _ in range(count))


@contextmanager
def _rule(patient: Patient, plan: PrivacyPlan) -> Generator[GradientRule]:
    """Give the real rule, with randomness of its own."""
    stream = SecureStream.from_operating_system()
    names, task, site = frozenset(patient.trained), patient.experiment.task, patient.site("probe")
    longest = longest_record(patient.adapted, site)
    rule = round_rule(plan, patient.local, patient.adapted, names, task, site.runtime, stream, longest)
    try:
        yield rule
    finally:
        rule.close()


def _alone(patient: Patient, rows: Sequence[Row]) -> torch.Tensor:
    """Return a unit's gradient by plain autograd, shape (d,): each record alone and unpadded, no rule of ours."""
    objective, adapted = build_objective(patient.experiment.task), patient.adapted
    adapted.load(patient.start)
    adapted.network.train()
    gradients: list[torch.Tensor] = []
    for row in rows:
        batch = collate(_records(patient, [row]).examples, adapted.base.pad_token_id).to(adapted.base.device)
        loss = objective.losses(adapted.network, batch).sum()
        parts = torch.autograd.grad(loss, list(patient.trained.values()), allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten().cpu().double() for part in parts]))
    total = torch.stack(gradients).sum(dim=0)
    mean = isinstance(patient.local, UserLevel) and patient.local.user_gradient == "mean"
    return total / len(gradients) if mean else total


def _released(patient: Patient, plan: PrivacyPlan, rows: Sequence[Row]) -> torch.Tensor:
    """Return the gradient that the optimizer is given when the site holds `rows` and all are drawn, shape (d,)."""
    experiment = patient.experiment
    local = experiment.federation.local.model_copy(update={"steps": 1})
    one_step = experiment.model_copy(update={"federation": experiment.federation.model_copy(update={"local": local})})
    records = _records(patient, rows)
    job = TrainingJob(
        file=patient.site("probe"),
        header=patient.instruction(one_step, 1, patient.start, patient.update_clip).header,
        adapted=patient.adapted,
        trained_names=frozenset(patient.trained),
        local=plain_round(patient.start, frozenset(patient.trained), local),
        examples=records.examples,
        units=records.units,
        privacy=replace(plan, sampling=PoissonSampling(1.0, len(records.units))),
    )
    given: list[torch.Tensor] = []

    def see(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        given.append(torch.cat([gradient_of(p) for group in optimizer.param_groups for p in group["params"]]))

    handle = register_optimizer_step_pre_hook(see)
    try:
        train(job, SecureStream.from_operating_system())
    finally:
        handle.remove()
    return given[0]


def _records(patient: Patient, rows: Sequence[Row]) -> SiteRecords:
    """Return what the site makes of some records."""
    work = Site(patient.site("probe"), rows=lambda: rows).work()
    return work.records(patient.adapted, patient.local, _KEY)
