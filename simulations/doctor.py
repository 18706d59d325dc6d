"""`cloister doctor`: real rounds at throw-away copies of an experiment's first site, watched from outside.

Nothing in the training code knows that it is watched: records are seen when they are looked up, gradients when the
optimizer is given them (torch's own global hook), the books in the throw-away ledger, the rest in the replies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.site import tokenize_site
from conf.schema.experiment import Experiment
from conf.schema.privacy import ClientLevel, LocalPrivacy, NoPrivacy, UserLevel, local_privacy
from finetuning.adapters import AdaptedModel, attach
from finetuning.batches import Example, collate
from finetuning.datasets import Row
from finetuning.loop import train_locally
from finetuning.models import load_base
from finetuning.tasks.build import build_objective
from privacy.doctor.subject import ObservedRound, Probe, Promise, Subject
from privacy.gradients import gradient_rule
from privacy.plan import PrivacyPlan
from privacy.randomness import SecureStream
from privacy.sampling import PoissonSampling
from protocol.errors import ConfigError
from protocol.instructions import Instruction, InstructionHeader, client_plan
from protocol.tensors import NamedTensors, add, digest
from simulations.population import site_file
from simulations.watching import StepLog, WatchedSite, frozen_digest, gradient_of, silenced, without_dropout
from strategies.build import build_strategy

__all__ = ["observe_site", "users_column"]

_ROUNDS, _STEPS = 2, 4
_PROBED = 6
"""Units whose removal is tried."""
_PROBE_NORMALIZER = 7.0
_DRAWS, _SLOTS_DRAWN = 2000, 40_000_000
_NO_LIMIT = 1e9
_STARVED = 1000
"""The starved site publishes so many times the expected batch, and has one record."""
_SPREAD = 0.05
_PRECISION = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}


@dataclass(frozen=True)
class _Patient:
    """The experiment to examine, its first site, and the model that is loaded for it."""

    experiment: Experiment
    name: str
    rows: Sequence[Row]
    scratch: Path
    adapted: AdaptedModel
    trained: Mapping[str, nn.Parameter]
    start: NamedTensors

    @property
    def local(self) -> LocalPrivacy:
        return local_privacy(self.experiment.privacy)


def observe_site(experiment: Experiment, parts: Mapping[str, Sequence[Row]], scratch: Path) -> Subject:
    """Return what is observed of real rounds at the first of the simulated sites.

    Args:
        experiment: what is to be examined; its data is not read again.
        parts: the records of each site, as `simulations.population` returns them.
        scratch: an empty folder for throw-away ledgers; no budget of anybody is touched.

    Raises:
        CloisterError: what the rounds themselves would raise: data, model, adapter or plan do not fit together.
    """
    patient = _admit(experiment, parts, scratch)
    adapted, log = patient.adapted, StepLog()
    hook = register_optimizer_step_pre_hook(log.step)
    try:
        with without_dropout(adapted.network):
            adapted.load(patient.start)
            before = frozen_digest(adapted.network, patient.trained)
            plan, published, trained = _rounds(patient, "trained", patient.rows, log)
            after = frozen_digest(adapted.network, patient.trained)
            with silenced(adapted.network):
                _, _, quiet = _rounds(patient, "silenced", patient.rows[:-1] or patient.rows, log)
            starved = _starved_round(patient, plan, log)
            probe = _probe(patient, plan)
            draws = _draws(patient, plan)
    finally:
        hook.remove()
        adapted.network.eval()
    promise = Promise(
        patient.local, patient.experiment.federation.local, _rounds_of(patient), published, len(patient.rows)
    )
    precision = _PRECISION[experiment.model.dtype]
    return Subject(promise, plan, probe, draws, trained, quiet, starved, before, after, precision)


def _admit(experiment: Experiment, parts: Mapping[str, Sequence[Row]], scratch: Path) -> _Patient:
    if not parts:
        raise ConfigError("there is no site to examine: data.partition leaves none; see `cloister data preview`")
    name, rows = next(iter(parts.items()))
    federation = experiment.federation
    # The same number of steps in all, so the same noise; only two rounds of a few steps are executed.
    steps = min(federation.local.steps, _STEPS)
    rounds = max(_ROUNDS, math.ceil(federation.local.steps * federation.rounds / steps))
    local = federation.local.model_copy(update={"steps": steps})
    copied = experiment.model_copy(
        update={
            "federation": federation.model_copy(update={"local": local, "rounds": rounds, "site_epsilon": _NO_LIMIT}),
            # Which mask a record meets depends on its batch; without dropout, sums can be compared.
            "peft": experiment.peft.model_copy(update={"dropout": 0.0}),
        }
    )
    base = load_base(copied.model, copied.task, copied.runtime.device)
    adapted = attach(base, copied.peft, copied.task)
    names = build_strategy(copied.strategy).trained(adapted.names)
    return _Patient(copied, name, rows, scratch, adapted, adapted.train_only(names), _start(adapted, copied, names))


def _start(adapted: AdaptedModel, experiment: Experiment, names: frozenset[str]) -> dict[str, torch.Tensor]:
    """Return an adapter in which no trained tensor is zero, so that every gradient has something to show."""
    generator = torch.Generator().manual_seed(experiment.seed)
    return {
        name: tensor + _SPREAD * torch.randn(tensor.shape, generator=generator) if name in names else tensor
        for name, tensor in sorted(adapted.initial(experiment.seed).items())
    }


def _rounds_of(patient: _Patient) -> int:
    return patient.experiment.federation.rounds


def _rounds(
    patient: _Patient, name: str, rows: Sequence[Row], log: StepLog
) -> tuple[PrivacyPlan, int, tuple[ObservedRound, ...]]:
    """Return the site's own plan, its published count, and its first rounds."""
    # All copies publish what the first site publishes: only what they hold differs.
    file = site_file(patient.experiment, patient.name, len(patient.rows), patient.scratch / name)
    site = WatchedSite(file, rows, log)
    try:
        plan = site.rehearse(client_plan(patient.experiment, "doctor"))
        observed, adapter = list[ObservedRound](), patient.start
        for number in range(1, _ROUNDS + 1):
            one, adapter = _round(site, patient, patient.experiment, number, adapter, log)
            observed.append(one)
        return plan, file.published_records, tuple(observed)
    finally:
        site.close()


def _starved_round(patient: _Patient, plan: PrivacyPlan, log: StepLog) -> ObservedRound:
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
    file = site_file(experiment, patient.name, published, patient.scratch / "starved")
    site = WatchedSite(file, patient.rows[:1], log)
    try:
        return _round(site, patient, experiment, 1, patient.start, log)[0]
    finally:
        site.close()


def _round(
    site: WatchedSite, patient: _Patient, experiment: Experiment, number: int, adapter: NamedTensors, log: StepLog
) -> tuple[ObservedRound, NamedTensors]:
    """Return what was seen of one real round, and the adapter after it."""
    plan = client_plan(experiment, "doctor")
    header = InstructionHeader(
        round=number,
        plan=plan,
        plan_digest=plan.digest,
        base_digest=patient.adapted.base.digest,
        adapter_digest=digest(adapter),
    )
    log.take()
    reply = site.handle(Instruction(header, {name: adapter[name] for name in sorted(patient.trained)}))
    if reply.header.status == "refused":
        raise ConfigError(f"the examined site refuses round {number} ({reply.header.code}): {reply.header.reason}")
    ledger = site.state.ledger
    moved = {name: float(tensor.double().norm()) for name, tensor in reply.tensors.items()}
    booked = () if ledger is None else tuple(ledger.mechanisms(plan.run))
    return ObservedRound(log.take(), reply.header, moved, booked), add(adapter, reply.tensors)


def _probe(patient: _Patient, plan: PrivacyPlan) -> Probe:
    """Return sums over a few units by the real loop and rule, without noise, all drawn."""
    units = _units(patient, plan)[:_PROBED]
    alone = tuple(_alone(patient, rows) for rows in units)
    # Most units are longer than this, some shorter.
    norms = sorted(float(gradient.norm()) for gradient in alone)
    clip_norm = norms[len(norms) // 4] * 0.999 if plan.is_private else math.inf
    probing = replace(
        plan,
        clip_norm=clip_norm,
        noise_multiplier=0.0,
        normalizer=_PROBE_NORMALIZER,
        discrete=False,
        loss=None,
        steps_per_round=1,
    )

    def released(chosen: Sequence[Sequence[Row]]) -> torch.Tensor:
        return _released(patient, probing, [row for unit in chosen for row in unit])

    without = tuple(released([*units[:left], *units[left + 1 :]]) for left in range(len(units)) if len(units) > 1)
    return Probe(clip_norm, _PROBE_NORMALIZER, alone, released(units), without)


def _units(patient: _Patient, plan: PrivacyPlan) -> list[list[Row]]:
    """Return the records that the plan says are protected together."""
    column = users_column(patient.experiment) if plan.unit == "user" else None
    if column is None:
        return [[row] for row in patient.rows]
    users: dict[object, list[Row]] = {}
    for row in patient.rows:
        users.setdefault(row.get(column), []).append(row)
    return list(users.values())


def users_column(experiment: Experiment) -> str | None:
    """Return the column that tells whose record a row is; None where the data has none."""
    column = getattr(experiment.data, "user_column", None)
    return column if isinstance(column, str) else None


def _alone(patient: _Patient, rows: Sequence[Row]) -> torch.Tensor:
    """Return a unit's gradient by plain autograd, shape (d,): each record alone and unpadded, no rule of ours."""
    objective, network = build_objective(patient.experiment.task), patient.adapted.network
    patient.adapted.load(patient.start)
    network.train()
    gradients: list[torch.Tensor] = []
    for example in _examples(patient, rows):
        batch = collate([example], patient.adapted.base.pad_token_id).to(patient.adapted.base.device)
        loss = objective.losses(network, batch).sum()
        parts = torch.autograd.grad(loss, list(patient.trained.values()), allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten().cpu().double() for part in parts]))
    total = torch.stack(gradients).sum(dim=0)
    mean = isinstance(patient.local, UserLevel) and patient.local.user_gradient == "mean"
    return total / len(gradients) if mean else total


def _released(patient: _Patient, plan: PrivacyPlan, rows: Sequence[Row]) -> torch.Tensor:
    """Return the gradient that the optimizer is given when the site holds `rows` and all are drawn, shape (d,)."""
    examples = _examples(patient, rows)
    given: list[torch.Tensor] = []

    def see(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        given.append(torch.cat([gradient_of(p) for group in optimizer.param_groups for p in group["params"]]))

    everyone = replace(plan, sampling=PoissonSampling(1.0, max(len(examples), 1)))
    patient.adapted.load(patient.start)
    rule = gradient_rule(
        everyone, _per_example(patient), patient.adapted.network, patient.trained, SecureStream.from_operating_system()
    )
    handle = register_optimizer_step_pre_hook(see)
    try:
        train_locally(
            patient.adapted,
            patient.trained,
            examples,
            build_objective(patient.experiment.task),
            rule,
            patient.experiment.federation.local.model_copy(update={"steps": 1}),
            seed=0,
            micro_batch_tokens=patient.experiment.runtime.micro_batch_tokens,
        )
    finally:
        handle.remove()
        rule.close()
    return given[0]


def _draws(patient: _Patient, plan: PrivacyPlan) -> tuple[np.ndarray, ...]:
    """Return what the real rule draws from a site whose slots are all filled."""
    slots = plan.sampling.slots
    count = int(min(max(_SLOTS_DRAWN / slots, 200), _DRAWS))
    rule = gradient_rule(
        plan, _per_example(patient), patient.adapted.network, patient.trained, SecureStream.from_operating_system()
    )
    try:
        return tuple(np.asarray(rule.draw(slots), dtype=np.int64) for _ in range(count))
    finally:
        rule.close()


def _examples(patient: _Patient, rows: Sequence[Row]) -> tuple[Example, ...]:
    file = site_file(patient.experiment, patient.name, len(patient.rows), patient.scratch / "probe")
    return tokenize_site(file, rows, patient.adapted).examples


def _per_example(patient: _Patient) -> str:
    return "" if isinstance(patient.local, NoPrivacy) else patient.local.per_example_gradients
