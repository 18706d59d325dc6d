"""What `cloister doctor` examines: an experiment's first site, shortened where that changes no promise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from conf.schema.experiment import Experiment
from conf.schema.privacy import ClientLevel, LocalPrivacy, UserLevel, local_privacy
from conf.schema.site import SiteFile
from finetuning.adapters import AdaptedModel, attach
from finetuning.models import load_base
from finetuning.people import people_of
from finetuning.rows import Row
from protocol.errors import ConfigError
from protocol.instructions import Instruction, InstructionHeader, client_plan
from protocol.tensors import NamedTensors, digest
from simulations.population import site_file
from strategies.build import build_strategy

__all__ = ["ROUNDS", "Patient", "admit", "rows_of"]

ROUNDS = 2
"""Rounds that are executed."""
_STEPS = 4
_NO_LIMIT = 1e6
_BITING_CLIP = 1e-3
"""Clip norm of a whole site's update while it is examined: any training goes farther, so that the clip has to act."""
_SPREAD = 0.05


@dataclass(frozen=True, eq=False)
class Patient:
    """The experiment to examine, its first site's records, and the model that is loaded for it."""

    experiment: Experiment
    name: str
    units: tuple[tuple[Row, ...], ...]
    """The records that are protected together: each alone, or all of one user's."""
    scratch: Path
    adapted: AdaptedModel
    trained: Mapping[str, nn.Parameter]
    start: NamedTensors

    @property
    def local(self) -> LocalPrivacy:
        """What the site enforces itself."""
        return local_privacy(self.experiment.privacy)

    @property
    def update_clip(self) -> float | None:
        """The bound on the update as a whole; None where nobody promises one."""
        privacy = self.experiment.privacy
        return privacy.clip_norm if isinstance(privacy, ClientLevel) else None

    @property
    def rows(self) -> list[Row]:
        """All records."""
        return rows_of(self.units)

    def site(self, purpose: str) -> SiteFile:
        """Return the site's file, with a state directory of its own for each purpose."""
        users = len(self.units) if isinstance(self.local, UserLevel) else None
        return site_file(self.experiment, self.name, len(self.rows), self.scratch / purpose, users)

    def instruction(
        self, experiment: Experiment, number: int, adapter: NamedTensors, clip_norm: float | None
    ) -> Instruction:
        """Return what a server would send in round `number`; `clip_norm` is None where none is asked for."""
        plan = client_plan(experiment, "doctor")
        header = InstructionHeader(
            round=number,
            plan=plan,
            plan_digest=plan.digest,
            base_digest=self.adapted.base.digest,
            adapter_digest=digest(adapter),
            clip_norm=clip_norm,
        )
        return Instruction(header, {name: adapter[name] for name in sorted(self.trained)})


def rows_of(units: Sequence[Sequence[Row]]) -> list[Row]:
    """Return the records of some units."""
    return [row for unit in units for row in unit]


def admit(experiment: Experiment, parts: Mapping[str, Sequence[Row]], scratch: Path) -> Patient:
    """Return the first site of an experiment, ready to be examined.

    Raises:
        CloisterError: no site, a site of one unit, or data, model and adapter that do not fit together.
    """
    if not parts:
        raise ConfigError("there is no site to examine: data.partition leaves none; see `cloister data preview`")
    name, rows = next(iter(parts.items()))
    shortened = _shortened(experiment)
    units = _grouped(rows, local_privacy(experiment.privacy), experiment.data.user_column)
    if len(units) < 2:
        raise ConfigError(
            f"site {name} holds {len(units)} protected unit; the checks compare sites that differ in one, so 2 or more "
            "are needed: see `cloister data preview`"
        )
    base = load_base(shortened.model, shortened.task, shortened.runtime.device)
    adapted = attach(base, shortened.peft, shortened.task, shortened.strategy.cores)
    names = build_strategy(shortened.strategy).trained(adapted.names, 1)
    start = _start(adapted, shortened, names)
    return Patient(shortened, name, units, scratch, adapted, adapted.train_only(names), start)


def _shortened(experiment: Experiment) -> Experiment:
    """Return the same number of steps in all, so the same noise, in rounds of a few steps."""
    federation, privacy = experiment.federation, experiment.privacy
    steps = min(federation.local.steps, _STEPS)
    rounds = max(ROUNDS, math.ceil(federation.local.steps * federation.rounds / steps))
    local = federation.local.model_copy(update={"steps": steps})
    if isinstance(privacy, ClientLevel):
        privacy = privacy.model_copy(update={"clip_norm": _BITING_CLIP})
    return experiment.model_copy(
        update={
            "federation": federation.model_copy(update={"local": local, "rounds": rounds, "site_epsilon": _NO_LIMIT}),
            "privacy": privacy,
            # Which mask a record meets depends on its batch; without dropout, sums can be compared.
            "peft": experiment.peft.model_copy(update={"dropout": 0.0}),
        }
    )


def _grouped(rows: Sequence[Row], privacy: LocalPrivacy, column: str | None) -> tuple[tuple[Row, ...], ...]:
    """Return the records that are promised to be protected together, by each one's person and no code of the site's."""
    if not isinstance(privacy, UserLevel) or column is None:
        return tuple((row,) for row in rows)
    users: dict[str, list[Row]] = {}
    for row, name in zip(rows, people_of(rows, column).names, strict=True):
        users.setdefault(name, []).append(row)
    return tuple(map(tuple, users.values()))


def _start(adapted: AdaptedModel, experiment: Experiment, names: frozenset[str]) -> dict[str, torch.Tensor]:
    """Return an adapter in which no trained tensor is zero, so that every gradient has something to show."""
    generator = torch.Generator().manual_seed(experiment.seed)
    return {
        name: tensor + _SPREAD * torch.randn(tensor.shape, generator=generator) if name in names else tensor
        for name, tensor in sorted(adapted.initial(experiment.seed).items())
    }
