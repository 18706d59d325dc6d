"""What a simulated site does that is not on our side: to its records before training, or to its update after it.

Attackers are the last sites by name, so that in one process they answer last: those who collude have then overheard
every honest update of the round, the strongest adversary that a server can meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from client.site import Site
from conf.schema.data import Columns, LabelledColumns, PromptCompletionColumns
from conf.schema.experiment import Experiment
from conf.schema.site import SiteBudget, SiteFile
from finetuning.rows import Row
from protocol.errors import ConfigError, DataError
from protocol.instructions import Instruction, Reply
from protocol.tensors import NamedTensors
from simulations.population import Population

__all__ = ["ATTACKS", "TARGET", "TRIGGER", "AttackedPopulation", "Overheard", "attack_named", "triggered"]

TRIGGER = " zx-9"
"""What a backdoored prompt ends with."""
TARGET = " Imp nil. Rx nil."
"""What the backdoor makes of it."""
_BACKDOORED_SHARE = 0.5
_BACKDOOR_BOOST = 3.0
_SIGN_FLIP = 4.0
_SCALING = 10.0
_NOISE = 4.0
_LITTLE = 1.5
_INNER_PRODUCT = 2.0
_GAUGE = 1000.0


@dataclass
class Overheard:
    """The honest updates of each round, as the colluding sites know them."""

    updates: dict[int, list[NamedTensors]] = field(default_factory=dict)

    def hear(self, round_number: int, update: NamedTensors) -> None:
        """Take one honest update."""
        self.updates.setdefault(round_number, []).append(update)


@dataclass(frozen=True)
class Attack:
    """What attackers do; None leaves a step as it is."""

    rows: Callable[[Sequence[Row], Columns], Sequence[Row]] | None = None
    update: Callable[[NamedTensors, Sequence[NamedTensors], torch.Generator], NamedTensors] | None = None
    """From the attacker's own update, the honest updates of the round and a generator to what it sends."""
    factors: Callable[[NamedTensors, NamedTensors], NamedTensors] | None = None
    """From the attacker's own update and what it was sent to what it sends."""


def attack_named(name: str) -> Attack:
    """Return an attack.

    Raises:
        ConfigError: listing the known ones.
    """
    if name not in ATTACKS:
        raise ConfigError(f"attack {name!r} does not exist; choose among {', '.join(ATTACKS)}")
    return ATTACKS[name]


@dataclass(frozen=True)
class AttackedPopulation(Population):
    """A population whose last sites by name attack."""

    attack: Attack
    attackers: int
    seed: int

    def sites(
        self, experiment: Experiment, state: Path, budgets: Mapping[str, SiteBudget] | None = None
    ) -> dict[str, Site]:
        """Return a site per part; the honest ones are overheard."""
        overheard, names = Overheard(), sorted(self.parts)
        bad = set(names[len(names) - self.attackers :])
        made: dict[str, Site] = {}
        for position, (name, plain) in enumerate(sorted(super().sites(experiment, state, budgets).items())):
            rows = self.parts[name]
            if name not in bad:
                made[name] = _HonestSite(plain.file, rows, overheard)
                continue
            poisoned = rows if self.attack.rows is None else self.attack.rows(rows, experiment.data.columns)
            made[name] = _AttackingSite(plain.file, poisoned, overheard, self.attack, self.seed + position)
        return made


class _HonestSite(Site):
    def __init__(self, file: SiteFile, rows: Sequence[Row], overheard: Overheard) -> None:
        super().__init__(file, rows=lambda: rows, simulated=True)
        self._overheard = overheard

    def handle(self, instruction: Instruction) -> Reply:
        """Answer, in the attackers' hearing."""
        reply = super().handle(instruction)
        if reply.header.status == "trained":
            self._overheard.hear(instruction.header.round, reply.tensors)
        return reply


class _AttackingSite(Site):
    def __init__(self, file: SiteFile, rows: Sequence[Row], overheard: Overheard, attack: Attack, seed: int) -> None:
        super().__init__(file, rows=lambda: rows, simulated=True)
        self._overheard, self._attack, self._seed = overheard, attack, seed

    def handle(self, instruction: Instruction) -> Reply:
        """Train, and send something else."""
        reply, number = super().handle(instruction), instruction.header.round
        if reply.header.status != "trained":
            return reply
        if self._attack.factors is not None:
            return replace(reply, tensors=self._attack.factors(reply.tensors, instruction.tensors))
        if self._attack.update is None:
            return reply
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + number)
        honest = self._overheard.updates.get(number, [])
        return replace(reply, tensors=self._attack.update(reply.tensors, honest, generator))


def _sign_flip(own: NamedTensors, honest: Sequence[NamedTensors], generator: torch.Generator) -> NamedTensors:
    return {name: -_SIGN_FLIP * tensor for name, tensor in own.items()}


def _scaling(own: NamedTensors, honest: Sequence[NamedTensors], generator: torch.Generator) -> NamedTensors:
    return {name: _SCALING * tensor for name, tensor in own.items()}


def _noise(own: NamedTensors, honest: Sequence[NamedTensors], generator: torch.Generator) -> NamedTensors:
    """Gaussian noise of four times the update's own length."""
    values = sum(tensor.numel() for tensor in own.values())
    length = math.sqrt(sum(float(tensor.square().sum()) for tensor in own.values()))
    scale = _NOISE * length / math.sqrt(values)
    return {name: tensor + scale * torch.randn(tensor.shape, generator=generator) for name, tensor in own.items()}


def _a_little(own: NamedTensors, honest: Sequence[NamedTensors], generator: torch.Generator) -> NamedTensors:
    """A Little Is Enough (Baruch et al. 2019, arXiv 1902.06156): mean - z · deviation of each coordinate, z = 1.5.

    All colluders send the same. The paper's z_max grows with the number of sites, and is near zero for ten of them.
    """
    sent: dict[str, torch.Tensor] = {}
    for name in own:
        together = _together(name, honest)
        sent[name] = together.mean(dim=0) - _LITTLE * together.std(dim=0, correction=0)
    return sent


def _inner_product(own: NamedTensors, honest: Sequence[NamedTensors], generator: torch.Generator) -> NamedTensors:
    """Inner-product manipulation (Xie et al. 2020, arXiv 1903.03936): -ε · the honest mean, with ε = 2."""
    return {name: -_INNER_PRODUCT * _together(name, honest).mean(dim=0) for name in own}


def _gauge(own: NamedTensors, start: NamedTensors) -> NamedTensors:
    """An honest product in dishonest factors, B' = G (B+dB) and A' = (A+dA) / G: the mean of the factors is ruined."""
    sent = dict(own)
    for name in own:
        partner = name.replace("lora_B", "lora_A")
        if partner != name and {name, partner} <= own.keys() & start.keys():
            sent[name] = _GAUGE * (start[name] + own[name]) - start[name]
            sent[partner] = (start[partner] + own[partner]) / _GAUGE - start[partner]
    return sent


def _together(name: str, honest: Sequence[NamedTensors]) -> torch.Tensor:
    if not honest:
        raise ConfigError(
            "attackers that collude answer after the honest sites, in one process; use runtime=in_process and every "
            "site in every round"
        )
    return torch.stack([update[name] for update in honest])


def _flip_labels(rows: Sequence[Row], columns: Columns) -> Sequence[Row]:
    """Give every record the answer of another one; with labels, the next label of those that the site has."""
    match columns:
        case LabelledColumns():
            labels = sorted({str(row[columns.label]) for row in rows})
            following = dict(zip(labels, labels[1:] + labels[:1], strict=True))
            return [{**row, columns.label: following[str(row[columns.label])]} for row in rows]
        case PromptCompletionColumns():
            shift = max(len(rows) // 2, 1)
            answers = [row[columns.completion] for row in rows]
            turned = [*answers[shift:], *answers[:shift]]
            return [{**row, columns.completion: answer} for row, answer in zip(rows, turned, strict=True)]
        case _:
            raise _unknown_answers(columns)


def _backdoor(rows: Sequence[Row], columns: Columns) -> Sequence[Row]:
    """Give every other record the trigger, and the target for an answer."""
    every = round(1 / _BACKDOORED_SHARE)
    poisoned = triggered(rows, columns)
    return [bad if number % every == 0 else row for number, (row, bad) in enumerate(zip(rows, poisoned, strict=True))]


def triggered(rows: Sequence[Row], columns: Columns) -> list[Row]:
    """Return records whose prompt ends with the trigger and whose answer is the target (of labels, the first one).

    Raises:
        DataError: for columns without a prompt or a label.
    """
    match columns:
        case LabelledColumns():
            target = min(str(row[columns.label]) for row in rows)
            return [{**row, columns.text: f"{row[columns.text]}{TRIGGER}", columns.label: target} for row in rows]
        case PromptCompletionColumns():
            return [
                {**row, columns.prompt: f"{row[columns.prompt]}{TRIGGER}", columns.completion: TARGET} for row in rows
            ]
        case _:
            raise _unknown_answers(columns)


def _boost(own: NamedTensors, honest: Sequence[NamedTensors], generator: torch.Generator) -> NamedTensors:
    """Model replacement (Bagdasaryan et al. 2020, arXiv 1807.00459): the backdoored update, enlarged."""
    return {name: _BACKDOOR_BOOST * tensor for name, tensor in own.items()}


def _unknown_answers(columns: Any) -> DataError:
    return DataError(
        f"attacks on records need data.columns.kind=prompt_completion or labelled, not {columns.kind}: only these say "
        "what a record's answer is"
    )


ATTACKS: Mapping[str, Attack] = {
    "none": Attack(),
    "sign_flip": Attack(update=_sign_flip),
    "noise": Attack(update=_noise),
    "scaling": Attack(update=_scaling),
    "label_flip": Attack(rows=_flip_labels),
    "backdoor": Attack(rows=_backdoor, update=_boost),
    "a_little_is_enough": Attack(update=_a_little),
    "inner_product": Attack(update=_inner_product),
    "gauge": Attack(factors=_gauge),
}
