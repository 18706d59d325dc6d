"""What a client-level run costs this whole site, booked in the site's own ledger before it trains.

The server adds the noise, so what is booked is what the server says of it. The site checks what can be checked: that
it agrees with the plan, and that this site is not asked more often than correlated noise allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conf.schema.privacy import ClientLevel
from privacy.accounting import epsilon_of
from privacy.ledger import Booking, Ledger, Reservation
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import SiteRefusal
from protocol.instructions import ClientPlan, InstructionHeader, ReleaseClaim

__all__ = ["WholeSite", "check_claim"]

_TOLERANCE = 1e-6
"""Relative; between two machines an ε may differ by its last digits."""


@dataclass(frozen=True)
class WholeSite:
    """One round in the ledger of the site as a unit."""

    ledger: Ledger
    reservation: Reservation
    booking: Booking

    @classmethod
    def reserve(cls, ledger: Ledger, header: InstructionHeader, inputs_digest: str) -> WholeSite:
        """Book the round; on disk when this returns. The same instruction again is free.

        Independent noise of a cohort that may be known costs one step a round, and nothing in rounds in which the site
        is not asked. A secret cohort is booked whole at the first round: the rounds in which the site is not drawn are
        part of what amplifies, and of what costs. Correlated noise is one mechanism, booked whole at the first round.

        Raises:
            SiteRefusal: the claim is missing, does not fit the plan, or the site is asked too often.
            BudgetExceeded: `site_budget` does not cover it; nothing is booked then.
        """
        plan, claim = header.plan, check_claim(header)
        correlated, secret = claim.min_separation is not None, claim.sampling_rate < 1
        whole = SubsampledGaussian(claim.sampling_rate, claim.noise_multiplier, 1 if correlated else plan.rounds)
        rounds = ledger.rounds_booked(plan.run)
        _refuse_too_often(claim, rounds, header.round)
        if correlated or secret:
            first = not rounds or header.round == min(rounds)
            mechanism = whole if first else whole.repeated(0)
        else:
            mechanism = whole.repeated(1)
        booking = Booking(plan.run, header.round, header.plan_digest, whole, mechanism, inputs_digest)
        return cls(ledger, ledger.reserve(booking), booking)

    def commit(self, output_digest: str) -> None:
        """Mark that the update was made, before it leaves; another one than before is booked afresh.

        Raises:
            BudgetExceeded: the budget does not cover it twice.
        """
        if self.reservation.output_digest not in (None, output_digest):
            fresh = self.ledger.reserve(self.booking, fresh=True)
            self.ledger.commit(fresh, output_digest)
            return
        self.ledger.commit(self.reservation, output_digest)


def check_claim(header: InstructionHeader) -> ReleaseClaim:
    """Return what the server says of its noise, if the plan's own figures bear it out.

    Raises:
        SiteRefusal: code `no_release_claim` or `wrong_release_claim`.
    """
    claim, privacy = header.release, header.plan.privacy
    if claim is None or not isinstance(privacy, ClientLevel):
        raise SiteRefusal("no_release_claim", "the server does not say how it noises the sum, so nothing can be booked")
    problem = _problem(claim, privacy, header.plan)
    if problem:
        raise SiteRefusal("wrong_release_claim", f"{problem}; server and plan disagree")
    return claim


def _problem(claim: ReleaseClaim, privacy: ClientLevel, plan: ClientPlan) -> str:
    correlated = privacy.noise.kind != "independent"
    limits = (claim.min_separation, claim.max_participations)
    if correlated != all(limit is not None for limit in limits) or (not correlated and any(limits)):
        return "limits on participation belong to correlated noise, both of them, and to nothing else"
    if correlated and claim.sampling_rate < 1:
        return "correlated noise is not amplified by sampling"
    if privacy.noise_multiplier is not None:
        if claim.noise_multiplier < privacy.noise_multiplier:
            return (
                f"the plan's noise multiplier is {privacy.noise_multiplier:g}, the claim's {claim.noise_multiplier:g}"
            )
        return ""
    steps = 1 if correlated else plan.rounds
    epsilon = epsilon_of([SubsampledGaussian(claim.sampling_rate, claim.noise_multiplier, steps)], claim.delta)
    if privacy.target_epsilon is not None and epsilon > privacy.target_epsilon * (1 + _TOLERANCE):
        return f"the plan's ε is {privacy.target_epsilon:g}, the claimed noise gives {epsilon:.4g}"
    return ""


def _refuse_too_often(claim: ReleaseClaim, rounds: Sequence[int], asked: int) -> None:
    """Correlated noise is priced under limits on participation: being asked is taking part."""
    if claim.min_separation is None or claim.max_participations is None or asked in rounds:
        return
    near = [other for other in rounds if abs(other - asked) < claim.min_separation]
    if near or len(rounds) >= claim.max_participations:
        raise SiteRefusal(
            "participation_limit",
            f"round {asked} is this site's number {len(rounds) + 1} of at most {claim.max_participations}"
            + (f", and less than {claim.min_separation} rounds from round {near[0]}" if near else ""),
        )
