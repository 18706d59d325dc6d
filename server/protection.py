"""What the server itself does for privacy in a round: client-level noise, or nothing where sites protect themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from conf.schema.experiment import Experiment
from conf.schema.privacy import ClientLevel
from privacy.client_level import bounded_weights, build_client_level_plan
from protocol.errors import PrivacyError
from protocol.instructions import PrivacyStatement, ReleaseClaim, Reply, client_plan
from protocol.tensors import Layout, NamedTensors
from server.budget import agreed_delta
from server.client_level import ClientLevelProtection
from server.cohort import Member, draw_cohort, weights_of
from server.events import Observer
from server.run_directory import RunDirectory
from strategies.base import Aggregator, Contribution, Strategy
from strategies.objectives.local_steps import effective_steps

__all__ = ["ClientLevelProtection", "NoProtection", "Protection", "protection_for"]


class Protection(Protocol):
    """Called in the order of its methods, once per round."""

    @property
    def needs_replies(self) -> bool:
        """Whether a round fails below `federation.min_replies`."""
        ...

    @property
    def secret_cohort(self) -> bool:
        """Whether who was asked must not be stored."""
        ...

    @property
    def clip_norm(self) -> float | None:
        """What sites clip their update to in the next round."""
        ...

    @property
    def claim(self) -> ReleaseClaim | None:
        """What sites are told of the server's noise."""
        ...

    def cohort(self, round_number: int) -> tuple[Member, ...]:
        """Return whom to ask."""
        ...

    def reserve(self, round_number: int, layout: Layout, aggregator: Aggregator) -> None:
        """Book what the round will cost, and get ready to fold updates of `layout`, by the strategy's own aggregator.

        Raises:
            BudgetExceeded: nothing must be sent then.
        """
        ...

    def fold(self, site: str, reply: Reply, start: NamedTensors) -> None:
        """Fold one verified reply, trained from `start`.

        Raises:
            ReplyRejected: it lacks what the strategy needs.
        """
        ...

    def combined(self) -> NamedTensors:
        """Return the round's update: from here on everything is post-processing."""
        ...

    def commit(self) -> PrivacyStatement | None:
        """Mark the round as spent, and return what was spent so far; before the new adapter is used or stored."""
        ...

    def state(self) -> Mapping[str, float | str]:
        """Return what the next round needs; stored in the checkpoint."""
        ...

    def restore(self, state: Mapping[str, float | str], layout: Layout) -> None:
        """Go on from what `state` returned before an interruption; `layout` is that of the updates."""
        ...

    def finish(self) -> None:
        """Called after the last round, before the adapter is handed out.

        Raises:
            FederationError: nothing of any site is in it.
        """
        ...

    def observer(self, observe: Observer) -> Observer:
        """Return an observer that passes on what may be known."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


def protection_for(
    experiment: Experiment, strategy: Strategy, members: tuple[Member, ...], directory: RunDirectory
) -> Protection:
    """Return what an experiment asks of the server.

    Raises:
        PrivacyError: client-level privacy that cannot be kept with these sites or this strategy, or whose δ is not the
            ledger's.
    """
    privacy = experiment.privacy
    if not isinstance(privacy, ClientLevel):
        return NoProtection(experiment, members)
    if strategy.sensitivity != "weighted_clip_norm" or not strategy.post_processes_sum:
        raise PrivacyError(
            f"strategy={experiment.strategy.kind} is no weighted sum of updates, so what one site can change is not "
            "bounded by its clip norm; use privacy=client_level with strategy=ffa_lora or fedit"
        )
    counts = {member.site: member.card.published_records for member in members}
    weights = bounded_weights(counts, experiment.strategy.weights, privacy.max_weight)
    books = directory.books
    delta = agreed_delta(privacy.delta, books.standing_budget())
    plan = build_client_level_plan(privacy.model_copy(update={"delta": delta}), experiment.federation, weights)
    epsilon = privacy.target_epsilon or plan.epsilon([plan.whole_run])
    sites = [member.site for member in members]
    budget = books.open(epsilon, plan, sites, directory.run, client_plan(experiment, directory.run).digest)
    return ClientLevelProtection(experiment, privacy.insecure_seed, plan, members, budget)


class NoProtection:
    """Sites protect themselves, or nobody does: the strategy combines what arrives."""

    needs_replies = True
    secret_cohort = False
    clip_norm = None
    claim = None

    def __init__(self, experiment: Experiment, members: tuple[Member, ...]) -> None:
        self._experiment, self._members = experiment, members
        self._weights = weights_of(members, experiment.strategy.weights)
        self._aggregator: Aggregator | None = None

    def cohort(self, round_number: int) -> tuple[Member, ...]:
        """See `draw_cohort`."""
        return draw_cohort(self._members, self._experiment.federation.cohort_size, self._experiment.seed, round_number)

    def reserve(self, round_number: int, layout: Layout, aggregator: Aggregator) -> None:
        """Book nothing."""
        self._aggregator = aggregator

    def fold(self, site: str, reply: Reply, start: NamedTensors) -> None:
        """Fold one update, with the site's weight."""
        header, federation = reply.header, self._experiment.federation
        local = federation.local
        self._folding.accumulate(
            Contribution(
                update=reply.tensors,
                weight=self._weights[site],
                start=start,
                steps=header.steps,
                site=site,
                metrics=header.metrics,
                learning_rate=local.optimizer.learning_rate
                * local.learning_rate_factor(header.round, federation.rounds),
                effective_steps=effective_steps(local.optimizer, header.steps),
            )
        )

    def combined(self) -> NamedTensors:
        """Return what the strategy makes of the updates."""
        return self._folding.result()

    def commit(self) -> None:
        """Nothing was spent here."""

    def state(self) -> Mapping[str, float | str]:
        """Return nothing: cohorts follow from the seed."""
        return {}

    def restore(self, state: Mapping[str, float | str], layout: Layout) -> None:
        """Nothing is carried on."""

    def finish(self) -> None:
        """A round without valid replies has failed before."""

    def observer(self, observe: Observer) -> Observer:
        """Pass on everything."""
        return observe

    def close(self) -> None:
        """Nothing is open."""

    @property
    def _folding(self) -> Aggregator:
        if self._aggregator is None:
            raise RuntimeError("a round must be reserved before anything is folded into it")
        return self._aggregator
