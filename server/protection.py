"""What the server itself does for privacy in a round: client-level noise, or nothing where sites protect themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from conf.schema.experiment import Experiment
from conf.schema.privacy import ClientLevel
from privacy.accounting import accountant_of
from privacy.client_level import ClientLevelPlan, bounded_weights, build_client_level_plan
from privacy.client_release import ClientLevelRelease, ClippedSum
from privacy.ledger import Reservation
from privacy.mechanisms import gathered
from privacy.randomness import SecureStream, inputs_digest
from privacy.sampling import PoissonSampling
from protocol.errors import PrivacyError
from protocol.instructions import PrivacyStatement, ReleaseClaim, Reply, client_plan
from protocol.tensors import Layout, NamedTensors, digest
from server.budget import RunBudget, agreed_delta
from server.cohort import Member, draw_cohort, draw_in_rotation, weights_of
from server.discretion import discreet
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
    if not strategy.is_linear:
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
    def needs_replies(self) -> bool:
        """Whether a round fails below `federation.min_replies`: not where who was asked, and replied, is a secret."""
        return not self._plan.secret_cohort

    @property
    def secret_cohort(self) -> bool:
        """Whether who was asked must not be stored."""
        return self._plan.secret_cohort

    @property
    def clip_norm(self) -> float:
        """What sites clip their update to in the next round."""
        return self._release.clip_norm

    @property
    def claim(self) -> ReleaseClaim:
        """What sites are told of the server's noise, and may book."""
        plan, limits = self._plan, self._plan.participation
        return ReleaseClaim(
            noise_multiplier=plan.noise_multiplier,
            sampling_rate=plan.sampling_rate,
            delta=plan.delta,
            min_separation=None if limits is None else limits.min_separation,
            max_participations=None if limits is None else limits.max_participations,
        )

    def state(self) -> dict[str, float | str]:
        """Return what a server that starts again needs beside its own ledger and keys: rounds released, the clip norm
        after them, and the digest of what decides how rounds are released. All are public.
        """
        return {"rounds": self._round, "clip_norm": self.clip_norm, "inputs": self._budget.inputs}

    def restore(self, state: Mapping[str, float | str], layout: Layout) -> None:
        """Go on after `state`: what the next rounds release is bit for bit what it would have been.

        Args:
            state: of `state`, after the last round whose adapter was stored.
            layout: of the updates.

        Raises:
            PrivacyError: sites, weights or settings are not those of the rounds before: the noise would be another.
        """
        if state.get("inputs") != self._budget.inputs:
            raise PrivacyError(
                f"run {self._budget.run} cannot go on: its sites, their published_records or its privacy settings are "
                "not those it began with, and its noise is bound to them; restore them, or start a new run"
            )
        self._round = int(state["rounds"])
        values = sum(math.prod(spec.shape) for spec in layout.values())
        self._release = ClientLevelRelease.resumed(
            self._plan, self._round, float(state["clip_norm"]), values, self._correlated_stream
        )

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
        self._reservation = self._budget.reserve(round_number, self._plan.mechanism(round_number))

    def fold(self, site: str, reply: Reply, start: NamedTensors) -> None:
        """Fold one clipped update, with the site's bounded weight."""
        self._folded.accumulate(reply.tensors, self._plan.weights[site], reply.header.below_clip)

    def combined(self) -> NamedTensors:
        """Return the noised sum over the public normalizer; the exact sum is dropped.

        A round that was released before, by a server that stopped then, gives the same bits. If other updates arrived
        this time, independent noise is a new release, and charged; correlated noise cannot be drawn anew.

        Raises:
            PrivacyError: with correlated noise, a round was released before with other updates.
            BudgetExceeded: the budget does not cover the new release.
        """
        reservation = self._reserved
        folded, self._sum = self._folded, None
        before = reservation.output_digest and self._release.copy()
        released = self._noised(folded, reservation.attempt)
        if before and digest(released) != reservation.output_digest:
            if self._plan.participation is not None or self._plan.secret_cohort:
                # Correlated noise must lie on one sum; and a second release from one secret cohort is no second sample:
                # booked as one, it would cost more than the books say.
                raise PrivacyError(
                    f"round {self._round} of run {self._budget.run} was released before, with other updates: neither "
                    "correlated noise nor a secret cohort can be used twice; start a new run"
                )
            self._release = before
            mechanism = self._plan.mechanism(self._round)
            self._reservation = self._budget.reserve(self._round, mechanism, fresh=True)
            released = self._noised(folded, self._reservation.attempt)
        self._released = digest(released)
        return released

    def _noised(self, folded: ClippedSum, attempt: int) -> NamedTensors:
        if self._plan.participation is not None:
            return self._release.release(folded, self._correlated_stream(self._round))
        context = ("noise", self._settings, self._round, _digest(folded), attempt)
        return self._release.release(folded, self._stream(*context))

    def _correlated_stream(self, round_number: int) -> SecureStream:
        """Return the randomness of a round's correlated noise: of the run and the round alone, so that it can be drawn
        again. That it lies on one sum only is what `combined` and the ledger see to.
        """
        return self._stream("noise", self._settings, round_number)

    def commit(self) -> PrivacyStatement:
        """Commit the reservation, and return the run's statement."""
        self._budget.commit(self._reserved, self._released)
        self._reservation = None
        plan, ledger = self._plan, self._budget.ledger
        account = ledger.account(self._budget.run)
        booked = gathered(ledger.mechanisms(self._budget.run))
        steps = sum(each.steps for each in booked)
        return PrivacyStatement(
            unit="site",
            relation=plan.relation,
            epsilon_run=ledger.spent(self._budget.run),
            epsilon_total=min(ledger.spent(), account.admitted),
            epsilon_budget=account.budget.epsilon,
            delta=plan.delta,
            accountant=accountant_of([plan.whole_run]),
            noise_multiplier=plan.noise_multiplier,
            clip_norm=self.clip_norm,
            sampling_rate=plan.sampling_rate,
            steps_executed=self._round if plan.participation else steps,
            mechanism=plan.whole_run.repeated(steps).to_json(),
            mechanisms=tuple(each.to_json() for each in booked),
            insecure_seed=self._insecure_seed is not None,
        )

    def observer(self, observe: Observer) -> Observer:
        """Keep who was asked, and who replied, out of everything that is shown or stored where cohorts are secret."""
        return discreet(observe) if self._plan.secret_cohort else observe

    def close(self) -> None:
        """Release the ledger's file."""
        self._budget.ledger.close()

    @property
    def _folded(self) -> ClippedSum:
        if self._sum is None:
            raise RuntimeError("a round must be reserved before anything is folded into it")
        return self._sum

    @property
    def _reserved(self) -> Reservation:
        if self._reservation is None:
            raise RuntimeError("a round must be reserved before anything of it is released")
        return self._reservation

    def _stream(self, *context: str | int) -> SecureStream:
        """Return randomness from the server's key, bound to the run, its settings and its sites.

        Independent noise is bound to the exact sum besides: the same noise never lies on two different sums, or their
        difference would be free of it.
        """
        if self._insecure_seed is None:
            return SecureStream.derived(self._budget.secret, "server", self._budget.inputs, *context)
        return SecureStream.insecure(self._insecure_seed, "server", *context)


def _digest(folded: ClippedSum) -> str:
    """Return the digest of all that is released of a round, rounded so that the order of arrival does not show."""
    parts = digest({name: part.float() for name, part in folded.parts.items()})
    return inputs_digest(parts, repr(folded.count))
