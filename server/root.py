"""The server's own update, which FLTrust compares the sites' with: trained on public records, as a site would."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from conf.schema.experiment import Experiment
from conf.schema.privacy import NoPrivacy
from conf.schema.robust import FLTrust
from finetuning.adapters import AdaptedModel
from finetuning.batches import Example
from finetuning.loop import train_locally
from finetuning.rows import Row
from finetuning.tasks.build import build_objective
from privacy.gradients import gradient_rule
from privacy.plan import build_plan
from privacy.randomness import SecureStream
from protocol.errors import DataError
from protocol.tensors import NamedTensors
from strategies.base import LocalStart
from strategies.build import build_strategy
from strategies.robust.server import ROOT_PREFIX

__all__ = ["RootTraining", "root_training", "split_root"]


class _HasRoot(Protocol):
    @property
    def root(self) -> Sequence[Example]: ...

    @property
    def adapted(self) -> AdaptedModel: ...


@dataclass(frozen=True)
class RootTraining:
    """Trains the server's copy of the network; the records are public, so nothing is protected."""

    experiment: Experiment
    adapted: AdaptedModel
    examples: Sequence[Example]

    def update(self, adapter: NamedTensors, round_number: int) -> NamedTensors:
        """Return one round's update from `adapter`, under the names that the robust rule looks for."""
        experiment, federation = self.experiment, self.experiment.federation
        local, strategy = federation.local, build_strategy(experiment.strategy)
        names = strategy.trained(self.adapted.names, round_number)
        factor = local.learning_rate_factor(round_number, federation.rounds)
        begun = strategy.client.begin(
            LocalStart(
                adapter=adapter,
                extras={},
                memory={},
                trained=names,
                uploaded=strategy.uploaded(self.adapted.names, round_number),
                local=local,
                learning_rate=local.optimizer.learning_rate * factor,
            )
        )
        stream = SecureStream.insecure(experiment.seed, "root", round_number)
        count = len(self.examples)
        plan = build_plan(NoPrivacy(), local, rounds=federation.rounds, published_units=count, num_units=count)
        self.adapted.load(begun.start)
        trained = self.adapted.train_only(names)
        train_locally(
            self.adapted,
            trained,
            self.examples,
            build_objective(experiment.task),
            gradient_rule(plan, "native", self.adapted.network, trained, stream),
            local,
            seed=int(stream.uniform(1)[0] * 2**53),
            micro_batch_tokens=experiment.runtime.micro_batch_tokens,
            learning_rate_factor=factor,
            correct=begun.correct,
        )
        update = begun.finish(self.adapted.extract()).update
        return {ROOT_PREFIX + name: tensor for name, tensor in update.items()}


def root_training(experiment: Experiment, evaluator: _HasRoot) -> RootTraining | None:
    """Return the server's own training where the robust rule needs one."""
    if not isinstance(experiment.strategy.robust, FLTrust):
        return None
    return RootTraining(experiment, evaluator.adapted, evaluator.root)


def split_root(experiment: Experiment, heldout: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return the root records and the held-out records that are left to evaluate on.

    Raises:
        DataError: the rule needs root records, and there are not enough held-out ones.
    """
    robust = experiment.strategy.robust
    if not isinstance(robust, FLTrust):
        return (), heldout
    if len(heldout) <= robust.root_records:
        raise DataError(
            f"robust=fltrust trains on strategy.robust.root_records={robust.root_records} public held-out records and "
            f"evaluates on the others, there are {len(heldout)}; lower it, or hold out more"
        )
    chosen = set(random.Random(f"root|{experiment.seed}").sample(range(len(heldout)), robust.root_records))
    return (
        [row for position, row in enumerate(heldout) if position in chosen],
        [row for position, row in enumerate(heldout) if position not in chosen],
    )
