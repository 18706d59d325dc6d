"""What the server itself does for privacy in a round: client-level noise, or nothing where sites protect themselves."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Protocol

from conf.schema.experiment import Experiment
from conf.schema.privacy import ClientLevel
from privacy.accounting import accountant_of
from privacy.client_level import ClientLevelPlan, bounded_weights, build_client_level_plan
from privacy.client_release import ClientLevelRelease, ClippedSum
from privacy.ledger import Reservation
from privacy.randomness import SecureStream
from privacy.sampling import PoissonSampling
from protocol.errors import PrivacyError
from protocol.instructions import PrivacyStatement, Reply, client_plan
from protocol.tensors import Layout, NamedTensors, digest
from server.budget import RunBudget, open_budget
from server.cohort import Member, draw_cohort, draw_in_rotation, weights_of
from server.events import Event, Observer, RoundFinished, RoundStarted, SiteReplied
from server.run_directory import RunDirectory
from strategies.base import Aggregator, Contribution, Strategy
from strategies.objectives.local_steps import effective_steps

__all__ = ["ClientLevelProtection", "NoProtection", "Protection", "protection_for"]

_log = logging.getLogger(__name__)


class Protection(Protocol):
    """Called in the order of its methods, once per round."""

    @property
    def needs_replies(self) -> bool:
        """Whether a round fails below `federation.min_replies`."""
        ...

    @property
    def clip_norm(self) -> float | None:
        """What sites clip their update to in the next round."""
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
        PrivacyError: client-level privacy that cannot be kept with these sites or this strategy.
    """
    privacy = experiment.privacy
    if not isinstance(privacy, ClientLevel):
        return NoProtection(experiment, members)
    if not strategy.is_linear:
        raise PrivacyError(
            f"strategy={experiment.strategy.kind} is no weighted sum of updates, so what one site can change is not "
            "bounded by its clip norm; use privacy=client_level with strategy=ffa_lora or fedit"
        )
    counts = {member.site: member.card.published_records for member in members}
    weights = bounded_weights(counts, experiment.strategy.weights, privacy.max_weight)
    plan = build_client_level_plan(privacy, experiment.federation, weights)
    sites, digest_of_plan = (member.site for member in members), client_plan(experiment, directory.run).digest
    budget = open_budget(directory.path, privacy, plan, sites, directory.run, digest_of_plan)
    return ClientLevelProtection(experiment, privacy.insecure_seed, plan, members, budget)


class NoProtection:
    """Sites protect themselves, or nobody does: the strategy combines what arrives."""

    needs_replies = True
    clip_norm = None

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


class ClientLevelProtection:
    """Cohorts, budget, clip norm and noise of a client-level run."""

    needs_replies = False  # how many replied depends on the sites, and a round takes its noise whoever replied

    def __init__(
        self,
        experiment: Experiment,
        insecure_seed: int | None,
        plan: ClientLevelPlan,
        members: tuple[Member, ...],
        budget: RunBudget,
    ) -> None:
        self._experiment, self._plan, self._members = experiment, plan, members
        self._insecure_seed = insecure_seed
        self._budget = budget
        self._settings = client_plan(experiment, "any").digest
        self._release = ClientLevelRelease(plan)
        self._round = 0
        self._reservation: Reservation | None = None
        self._released = ""
        self._sum: ClippedSum | None = None

    @property
    def clip_norm(self) -> float:
        """What sites clip their update to in the next round."""
        return self._release.clip_norm

    def cohort(self, round_number: int) -> tuple[Member, ...]:
        """Return a Poisson cohort, which may be empty, or `cohort_size` sites within the participation limits."""
        federation, seed = self._experiment.federation, self._experiment.seed
        if self._plan.secret_cohort:
            sampling = PoissonSampling(self._plan.sampling_rate, self._plan.population)
            drawn = sampling.draw(self._plan.population, self._stream("cohort", round_number))
            return tuple(self._members[position] for position in drawn)
        if self._plan.participation is None:
            return draw_cohort(self._members, federation.cohort_size, seed, round_number)
        return draw_in_rotation(self._members, federation.cohort_size or len(self._members), seed, round_number)

    def reserve(self, round_number: int, layout: Layout, aggregator: Aggregator) -> None:
        """Book the round; with correlated noise, the whole run before round 1."""
        self._round = round_number
        self._sum = self._release.new_sum(layout)
        mechanism = self._plan.mechanism(round_number)
        if mechanism is not None:
            self._reservation = self._budget.reserve(round_number, mechanism)

    def fold(self, site: str, reply: Reply, start: NamedTensors) -> None:
        """Fold one clipped update, with the site's bounded weight."""
        self._folded.accumulate(reply.tensors, self._plan.weights[site], reply.header.below_clip)

    def combined(self) -> NamedTensors:
        """Return the noised sum over the public normalizer; the exact sum is dropped."""
        folded, self._sum = self._folded, None
        released = self._release.release(folded, self._stream("noise", self._settings, self._round, _digest(folded)))
        self._released = digest(released)
        return released

    def commit(self) -> PrivacyStatement:
        """Commit the reservation, and return the run's statement."""
        if self._reservation is not None:
            self._budget.commit(self._reservation, self._released)
            self._reservation = None
        plan, spent = self._plan, self._budget.ledger.spent()
        return PrivacyStatement(
            unit="site",
            relation=plan.relation,
            epsilon_run=spent,
            epsilon_total=spent,
            epsilon_budget=self._budget.ledger.budget.epsilon,
            delta=plan.delta,
            accountant=accountant_of([plan.whole_run]),
            noise_multiplier=plan.noise_multiplier,
            clip_norm=self.clip_norm,
            sampling_rate=plan.sampling_rate,
            steps_executed=self._round,
            insecure_seed=self._insecure_seed is not None,
        )

    def observer(self, observe: Observer) -> Observer:
        """Keep who was asked, and who replied, out of everything that is shown or stored where cohorts are secret."""
        return _discreet(observe) if self._plan.secret_cohort else observe

    def close(self) -> None:
        """Release the ledger's file."""
        self._budget.ledger.close()

    @property
    def _folded(self) -> ClippedSum:
        if self._sum is None:
            raise RuntimeError("a round must be reserved before anything is folded into it")
        return self._sum

    def _stream(self, *context: str | int) -> SecureStream:
        """Return fresh randomness: the operating system's, unless it is to be repeatable.

        Repeatable noise is bound to the settings and to the exact sum that it is added to: the same noise never lies
        on two different sums, or their difference would be free of it.
        """
        if self._insecure_seed is None:
            return SecureStream.from_operating_system()
        return SecureStream.insecure(self._insecure_seed, "server", *context)


def _digest(folded: ClippedSum) -> str:
    """Return the digest of a sum, rounded so that the order of arrival does not show."""
    return digest({name: part.float() for name, part in folded.parts.items()})


def _discreet(observe: Observer) -> Observer:
    def pass_on(event: Event) -> None:
        match event:
            case RoundStarted():
                observe(replace(event, cohort=()))
            case SiteReplied():
                if not event.accepted:
                    _log.warning("round %d: a reply was not used: %s, %s", event.round, event.code, event.reason)
            case RoundFinished():
                observe(replace(event, accepted=None, rejected=None))
            case _:
                observe(event)

    return pass_on
