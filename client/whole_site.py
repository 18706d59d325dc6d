"""What a client-level run costs this whole site, booked in the site's own ledger before it trains.

The server adds the noise, so what is booked is what the server says of it (`client.claims` compares it with the plan).
The site counts for itself how often it is asked, under which claim, and with which inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from scipy.stats import binom

from client.claims import check_claim, whole_release
from privacy.ledger import Booking, Charge, Ledger, Reservation
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import SiteRefusal
from protocol.instructions import InstructionHeader, ReleaseClaim

__all__ = ["WholeSite"]

_BY_CHANCE = 1e-9
"""How rarely an honest server is refused for having drawn a site too often, per run."""


@dataclass(frozen=True)
class WholeSite:
    """One round in the ledger of the site as a unit."""

    ledger: Ledger
    reservation: Reservation
    booking: Booking
    correlated: bool

    @classmethod
    def reserve(cls, ledger: Ledger, header: InstructionHeader, inputs_digest: str) -> WholeSite:
        """Book the round; on disk when this returns. The same instruction again is free.

        Independent noise of a cohort that may be known costs one step a round, and nothing in rounds in which the site
        is not asked. A secret cohort is booked whole at the first round: the rounds in which the site is not drawn are
        part of what amplifies, and of what costs. Correlated noise is one mechanism, booked whole at the first round.

        Later rounds cost nothing more only under the very plan and claim that were booked. A round asked again with
        other inputs is another release: of independent noise one step, not amplified, because the cohort is the same.
        Who is asked more often than the claimed rate explains refuses.

        Raises:
            SiteRefusal: the claim is missing, does not fit the plan, or the site is asked too often; `round_repeated`
                if correlated noise is asked to lie on another update of a round.
            BudgetExceeded: `site_budget` does not cover it; nothing is booked then.
        """
        claim = check_claim(header, ledger.budget.delta)
        booked = ledger.charges(header.plan.run)
        _refuse_too_often(claim, tuple(sorted({charge.round for charge in booked})), header.round)
        _refuse_too_lucky(claim, header.plan.rounds, {charge.round for charge in booked} | {header.round})
        whole, terms = whole_release(claim, header.plan), _terms(header, claim)
        booking = Booking(header.plan.run, header.round, terms, whole, whole, inputs_digest)
        correlated = claim.min_separation is not None
        if correlated or claim.sampling_rate < 1:
            booking = replace(booking, mechanism=_due(booking, booked, correlated))
        else:
            booking = replace(booking, mechanism=_unamplified(whole))
        return cls(ledger, ledger.reserve(booking), booking, correlated)

    def commit(self, output_digest: str) -> None:
        """Mark that the update was made, before it leaves; another one than before is booked afresh.

        Raises:
            SiteRefusal: `round_repeated` if it is another one than before, and the noise is correlated.
            BudgetExceeded: the budget does not cover it twice.
        """
        if self.reservation.output_digest in (None, output_digest):
            self.ledger.commit(self.reservation, output_digest)
            return
        if self.correlated:
            raise _repeated(self.booking)
        again = replace(self.booking, mechanism=_unamplified(self.booking.schedule))
        self.ledger.commit(self.ledger.reserve(again, fresh=True), output_digest)


def _due(booking: Booking, booked: Sequence[Charge], correlated: bool) -> SubsampledGaussian:
    """Return what a round costs of a mechanism that is booked whole at its first."""
    whole = booking.schedule
    prices = (whole, whole.repeated(0), _unamplified(whole))
    same = [charge for charge in booked if charge.plan_digest == booking.plan_digest and charge.mechanism in prices]
    here = [charge for charge in booked if charge.round == booking.round]
    exact = [charge for charge in here if charge in same and charge.inputs_digest == booking.inputs_digest]
    if correlated and here and not exact:
        raise _repeated(booking)
    if not any(charge.mechanism == whole for charge in same):
        return whole
    if exact:
        return exact[-1].mechanism
    return _unamplified(whole) if here else whole.repeated(0)


def _unamplified(whole: SubsampledGaussian) -> SubsampledGaussian:
    return SubsampledGaussian(1.0, whole.noise_multiplier, 1)


def _terms(header: InstructionHeader, claim: ReleaseClaim) -> str:
    """Return the plan's digest, with the limits that price correlated noise: a plan may leave them to the server."""
    if claim.min_separation is None:
        return header.plan_digest
    return f"{header.plan_digest} min_separation={claim.min_separation} max_participations={claim.max_participations}"


def _repeated(booking: Booking) -> SiteRefusal:
    return SiteRefusal(
        "round_repeated",
        f"round {booking.round} of run {booking.run} was answered before, under another plan or claim, from other "
        "inputs or with another result: correlated noise must not lie on both; start a new run",
    )


def _refuse_too_lucky(claim: ReleaseClaim, rounds: int, asked: Collection[int]) -> None:
    """Refuse when nobody who draws cohorts at the claimed rate would ask this often: the claim's price is too low.

    A site that is drawn with probability q in each of T rounds is asked Bin(T, q) times.
    """
    if claim.sampling_rate < 1 and binom.sf(len(asked) - 1, rounds, claim.sampling_rate) < _BY_CHANCE:
        raise SiteRefusal(
            "participation_limit",
            f"round {max(asked)} is this site's number {len(asked)} of {rounds}, and the server claims to draw it at a "
            f"rate of {claim.sampling_rate:g}: by chance that happens less than once in {1 / _BY_CHANCE:.0e} runs",
        )


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
