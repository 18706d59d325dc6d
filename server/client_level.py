"""What the server does for client-level privacy in a round: cohort, budget, clip norm and noise."""

from __future__ import annotations

import hmac
import math
from collections.abc import Mapping

from conf.schema.experiment import Experiment
from privacy.accounting import accountant_of
from privacy.client_level import ClientLevelPlan
from privacy.client_release import ClientLevelRelease, ClippedSum
from privacy.ledger import Reservation
from privacy.mechanisms import gathered
from privacy.randomness import SecureStream, inputs_digest
from privacy.sampling import PoissonSampling
from protocol.errors import FederationError, PrivacyError
from protocol.instructions import PrivacyStatement, ReleaseClaim, Reply, client_plan
from protocol.tensors import Layout, NamedTensors, digest
from server.budget import RunBudget
from server.cohort import Member, draw_cohort, draw_in_rotation
from server.discretion import discreet
from server.events import Observer
from strategies.base import Aggregator

__all__ = ["ClientLevelProtection"]


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
        self._heard = False
        """Whether any update was folded into this run."""

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
        after them, and the digest of what decides how rounds are released. These are public; whether an update was
        folded yet is not, so it stands there as a keyed hash, another one after every round.
        """
        return {
            "rounds": self._round,
            "clip_norm": self.clip_norm,
            "inputs": self._budget.inputs,
            "heard": self._marked(self._heard),
        }

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
        self._heard = state.get("heard") != self._marked(False)
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
        self._heard = True

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

    def finish(self) -> None:
        """Refuse to hand out noise as an adapter. A round of a secret cohort must not fail, as that would tell of it:
        an empty one is a round like any other. That a whole run was empty says nothing of any round that was not.

        Raises:
            FederationError: in no round was any update used.
        """
        if self._plan.secret_cohort and not self._heard:
            raise FederationError(
                f"no update of any site was used in any of the {self._round} rounds, so the adapter is noise alone and "
                "is not stored; the log has the codes of the replies that were not used: mend those sites, or raise "
                "federation.cohort_size or federation.rounds if there are none"
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

    def _marked(self, heard: bool) -> str:
        """Return the keyed hash that stands for whether an update was folded up to this round."""
        message = f"heard|{self._budget.inputs}|{self._round}|{heard}"
        return hmac.new(self._budget.secret, message.encode(), "sha256").hexdigest()

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
