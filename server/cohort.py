"""Who takes part: waiting for sites, asking for their cards, and drawing each round's cohort."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from privacy.correlated.participation import Participation
from protocol.errors import FederationError, ReplyRejected
from protocol.instructions import SiteCard
from protocol.records import record_to_card

__all__ = ["Invitations", "Member", "draw_cohort", "draw_within_limits", "enroll", "weights_of"]

_log = logging.getLogger(__name__)
_POLL_S = 1.0


@dataclass(frozen=True)
class Member:
    """A connected site: its Flower node, and what it says of itself."""

    node_id: int
    card: SiteCard

    @property
    def site(self) -> str:
        """The site's name."""
        return self.card.site


def enroll(
    grid: Grid,
    expected_sites: int,
    timeout_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Member, ...]:
    """Wait until `expected_sites` nodes are connected, ask each for its card, and return them sorted by name.

    Raises:
        FederationError: too few nodes in time, or two nodes with one name.
    """
    deadline = clock() + timeout_s
    while len(nodes := sorted(grid.get_node_ids())) < expected_sites:
        if clock() > deadline:
            raise FederationError(
                f"{len(nodes)} of federation.expected_sites={expected_sites} sites connected within {timeout_s:.0f} s; "
                "start the missing SuperNodes, or lower federation.expected_sites"
            )
        sleep(_POLL_S)
    messages = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    members: dict[str, Member] = {}
    for reply in grid.send_and_receive(messages, timeout=max(deadline - clock(), _POLL_S)):
        member = _member(reply)
        if member is None:
            continue
        if member.site in members:
            raise FederationError(f"two nodes call themselves {member.site!r}; give each site file its own name")
        members[member.site] = member
    if len(members) < expected_sites:
        raise FederationError(
            f"{len(members)} of federation.expected_sites={expected_sites} sites answered with a card; "
            "the log above names the nodes that did not"
        )
    return tuple(members[name] for name in sorted(members))


def draw_cohort(members: tuple[Member, ...], size: int | None, seed: int, round_number: int) -> tuple[Member, ...]:
    """Return the round's cohort: everybody, or `size` members drawn without replacement, in the order of their names.

    The server draws and knows the cohort, so nothing is gained in privacy by it, and no amplification is claimed.

    Raises:
        FederationError: a cohort larger than the population.
    """
    if size is None:
        return members
    if size > len(members):
        raise FederationError(
            f"federation.cohort_size={size} is larger than the population of {len(members)} sites; "
            f"use at most {len(members)}, or null for all"
        )
    chosen = random.Random(f"cohort|{seed}|{round_number}").sample(members, size)
    return tuple(sorted(chosen, key=lambda member: member.site))


@dataclass(frozen=True)
class Invitations:
    """In which rounds each site was asked: taking part means being asked, whether or not the site replied."""

    rounds: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def extended(self, cohort: tuple[Member, ...], round_number: int) -> Invitations:
        """Return the invitations with one more round."""
        asked = {member.site: (*self.rounds.get(member.site, ()), round_number) for member in cohort}
        return Invitations({**self.rounds, **asked})

    def allow(self, site: str, round_number: int, limits: Participation) -> bool:
        """Whether a site may be asked in a round, after those before it."""
        before = self.rounds.get(site, ())
        return len(before) < limits.max_participations and (
            not before or round_number - before[-1] >= limits.min_separation
        )


def draw_within_limits(
    members: tuple[Member, ...],
    size: int,
    seed: int,
    round_number: int,
    limits: Participation,
    invitations: Invitations,
) -> tuple[Member, ...]:
    """Return `size` sites that the limits allow, those that were not asked for longest, in the order of their names.

    Ties are broken at random. In rotation no site is asked again before all others were, so it waits for
    len(members) // size rounds, and no two sites differ by more than one participation: whatever
    `Participation.refuse_impossible` lets pass can be kept to the last round.

    Raises:
        FederationError: too few sites may be asked.
    """
    allowed = [member for member in members if invitations.allow(member.site, round_number, limits)]
    if len(allowed) < size:
        raise FederationError(
            f"round {round_number} needs {size} sites, only {len(allowed)} may take part with min_separation="
            f"{limits.min_separation} and max_participations={limits.max_participations}; lower "
            "federation.cohort_size or federation.rounds"
        )
    random.Random(f"cohort|{seed}|{round_number}").shuffle(allowed)
    allowed.sort(key=lambda member: invitations.rounds.get(member.site, (0,))[-1])
    return tuple(sorted(allowed[:size], key=lambda member: member.site))


def weights_of(cohort: tuple[Member, ...], kind: str) -> Mapping[str, float]:
    """Return each site's aggregation weight: 1, or its published record count. Both are public."""
    return {
        member.site: float(member.card.published_records) if kind == "published_records" else 1.0 for member in cohort
    }


def _member(reply: Message) -> Member | None:
    if reply.has_error():
        _log.warning("node %d sent no card: %s", reply.metadata.src_node_id, reply.error.reason)
        return None
    try:
        return Member(reply.metadata.src_node_id, record_to_card(reply.content))
    except ReplyRejected as error:
        _log.warning("node %d sent no usable card: %s", reply.metadata.src_node_id, error)
        return None
