"""How often a unit may take part: the assumption behind correlated noise, as data."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import PrivacyError

__all__ = ["Participation"]


@dataclass(frozen=True)
class Participation:
    """A unit takes part at most `max_participations` times in `rounds`, any two of them `min_separation` apart."""

    rounds: int
    min_separation: int
    max_participations: int

    @classmethod
    def in_rotation(
        cls, rounds: int, population: int, cohort: int, min_separation: int | None, max_participations: int | None
    ) -> Participation:
        """Return the limits asked for; what is None becomes the tightest that asking the sites in rotation keeps."""
        separation = max(1, population // cohort) if min_separation is None else min_separation
        most = -(-rounds * cohort // population) if max_participations is None else max_participations
        return cls(rounds, separation, most)

    @property
    def most(self) -> int:
        """The most rounds in which one unit can take part."""
        return min(self.max_participations, -(-self.rounds // self.min_separation))

    def refuse_impossible(self, population: int, cohort: int) -> None:
        """Check that `cohort` of `population` sites can be asked in every round within the limits.

        Both conditions are necessary (the sites of `min_separation` consecutive rounds all differ; invitations add
        up), and asking the sites in rotation, as the server does, keeps the limits wherever both hold.

        Raises:
            PrivacyError: naming the limit that is too tight, and what to change.
        """
        if cohort > population:
            raise PrivacyError(
                f"federation.cohort_size={cohort} is larger than the population of {population} sites; use at most "
                f"{population}, or null for all"
            )
        window = min(self.min_separation, self.rounds)
        if cohort * window > population:
            smaller = f", or federation.cohort_size to {population // window}" if population >= window else ""
            raise PrivacyError(
                f"privacy.noise.min_separation={self.min_separation} with {cohort} of {population} sites in every "
                f"round needs {cohort * window} sites: lower privacy.noise.min_separation to {population // cohort}"
                f"{smaller}"
            )
        invitations = cohort * self.rounds
        if invitations > population * self.max_participations:
            raise PrivacyError(
                f"privacy.noise.max_participations={self.max_participations} lets {population} sites take part "
                f"{population * self.max_participations} times in all, {self.rounds} rounds of {cohort} need "
                f"{invitations}: raise privacy.noise.max_participations to {-(-invitations // population)}, or use "
                "fewer rounds or a smaller federation.cohort_size"
            )
