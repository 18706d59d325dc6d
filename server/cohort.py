"""Who takes part: waiting for sites, asking for their cards, and drawing each round's cohort."""

from __future__ import annotations

import logging
import math
import random
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from privacy.ledger import VerifyingKey
from protocol.cards import CHALLENGE_BYTES, SiteCard
from protocol.errors import FederationError, ReplyRejected
from protocol.records import challenge_to_record, record_to_card
from server.arrivals import Unreadable, pull_one, reading

__all__ = ["Member", "draw_cohort", "draw_in_rotation", "enroll", "of_full_rank", "weights_of"]

_log = logging.getLogger(__name__)
_POLL_S = 0.5
_GRACE_S = 15.0
"""What nodes that have not answered yet get when enough others have."""


@dataclass(frozen=True)
class Member:
    """A connected site: its Flower node, and what it says of itself."""

    node_id: int
    card: SiteCard

    @property
    def site(self) -> str:
        """The site's name."""
        return self.card.site

    @property
    def rank(self) -> int | None:
        """The most LoRA rank that the site trains; None: the plan's."""
        return self.card.trained_rank


def enroll(
    grid: Grid,
    expected_sites: int,
    timeout_s: float,
    *,
    names: Collection[str] | None = None,
    keys: Mapping[str, str] | None = None,
    challenge: Callable[[int], bytes] = secrets.token_bytes,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Member, ...]:
    """Ask every node for its card, as it connects, until `expected_sites` have answered; return them sorted by name.

    Nodes that have been asked by then get a few seconds more; then the run starts without those that hang. A node
    that disconnects before the start is out, and is asked again when it returns.

    With `names`, the sites of a run that is resumed, all of these are waited for and no other takes part: a cohort
    drawn from other sites would be another run.

    A card is signed for the question it answers. Under a name that `keys` has a public key for, only who signed with
    that key takes part. Of two others with one name it is the first that answered; the second is passed over with a
    warning.

    Raises:
        FederationError: too few cards in time, or one of `names` missing.
    """
    if math.isinf(timeout_s):
        timeout_s = 0.0  # in one process a node answers when it is asked, or never
    deadline, starts_by = clock() + timeout_s, math.inf
    roll = _Roll(grid, keys or {}, challenge)
    while True:
        roll.poll()
        members = roll.members
        present = set(members)
        if names is not None and present.issuperset(names):
            break
        now, cards = clock(), len(present) if names is None else 0
        starts_by = min(starts_by, now + _GRACE_S) if cards >= expected_sites else math.inf
        if cards >= expected_sites and (now >= starts_by or not roll.pending):
            break
        if names is not None and now >= deadline:
            missing = ", ".join(sorted(set(names) - present))
            raise FederationError(
                f"sites of this run have not connected within {timeout_s:.0f} s: {missing}; a run is resumed with the "
                "sites that it started with, so start their SuperNodes"
            )
        if cards < expected_sites and now >= deadline:
            raise FederationError(
                f"{cards} of federation.expected_sites={expected_sites} sites answered with a card within "
                f"{timeout_s:.0f} s, nodes connected: {roll.connected}; start the missing SuperNodes, or lower "
                "federation.expected_sites"
            )
        sleep(_POLL_S)
    for node in roll.pending:
        _log.warning("node %d has not sent its card; the run starts without it", node)
    chosen = [member for member in members.values() if names is None or member.site in names]
    return tuple(sorted(chosen, key=lambda member: member.site))


def of_full_rank(members: tuple[Member, ...], rank: int, reason: str) -> tuple[Member, ...]:
    """Return the members that train the plan's rank; the others are left out before anything is sent.

    Args:
        members: who has enrolled.
        rank: the plan's.
        reason: what needs updates of one shape, as `group=kind`.

    Raises:
        FederationError: nobody is left.
    """
    low = [member for member in members if member.rank is not None and member.rank < rank]
    named = ", ".join(f"{member.site} (trained_rank={member.rank})" for member in low)
    if low and len(low) == len(members):
        raise FederationError(
            f"{reason} needs updates of one shape, and no site trains peft.rank={rank}: {named}; lower peft.rank"
        )
    if low:
        _log.warning("left out, since %s needs updates of one shape and peft.rank=%d: %s", reason, rank, named)
    return tuple(member for member in members if member not in low)


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


def draw_in_rotation(members: tuple[Member, ...], size: int, seed: int, round_number: int) -> tuple[Member, ...]:
    """Return the next `size` sites of an endless rotation in an order drawn at random, in the order of their names.

    A site's invitations are len(members) invitations apart, so len(members) // size or more rounds, and no site is
    asked more than one time more than another. Every participation limit that `Participation.refuse_impossible` lets
    pass is thereby kept. Taking part means being asked, whether or not the site replies.
    """
    order = list(members)
    random.Random(f"rotation|{seed}").shuffle(order)
    first = (round_number - 1) * size
    chosen = [order[(first + offset) % len(order)] for offset in range(size)]
    return tuple(sorted(chosen, key=lambda member: member.site))


def weights_of(cohort: tuple[Member, ...], kind: str) -> Mapping[str, float]:
    """Return each site's aggregation weight: 1, or its published record count. Both are public."""
    return {
        member.site: float(member.card.published_records) if kind == "published_records" else 1.0 for member in cohort
    }


def _card_of(reply: Message | Unreadable) -> SiteCard:
    """Return the card in a reply.

    Raises:
        ReplyRejected: there is none that can be read, whatever the node sent instead.
    """
    if isinstance(reply, Unreadable):
        raise ReplyRejected("malformed_card", reply.reason)
    with reading("the card", "malformed_card"):
        return record_to_card(reply.content)


class _Roll:
    """The connected nodes: who was asked for a card, and who sent one."""

    def __init__(self, grid: Grid, keys: Mapping[str, str], challenge: Callable[[int], bytes]) -> None:
        self._grid, self._keys, self._challenge = grid, keys, challenge
        self._queries: dict[int, bytes] = {}
        """The challenge of each node that was asked."""
        self._cards: dict[int, Member] = {}
        """By node, in the order in which they came."""
        self.connected = 0
        self.pending: dict[int, str] = {}
        """The nodes that have not answered, and their queries' identifiers."""

    @property
    def members(self) -> Mapping[str, Member]:
        """The sites by name, one node each. A node that was passed over takes part when the other one leaves."""
        chosen: dict[str, Member] = {}
        for member in self._cards.values():
            chosen.setdefault(member.site, member)
        return chosen

    def poll(self) -> None:
        """Ask who is new, forget who left, and take what has arrived."""
        connected = sorted(self._grid.get_node_ids())
        self.connected = len(connected)
        for known in (self._queries, self._cards, self.pending):
            for node in known.keys() - connected:
                del known[node]
        for node in connected:
            if node not in self._queries:
                self._ask(node)
        for node, query in tuple(self.pending.items()):
            # Not by sender: a node that died is reported under the SuperLink's own id.
            reply = pull_one(self._grid, query)
            if reply is not None:
                del self.pending[node]
                self._take(node, reply)

    def _ask(self, node: int) -> None:
        """Ask one node; one that cannot be reached is asked again at the next poll."""
        challenge = self._challenge(CHALLENGE_BYTES)
        asking = Message(challenge_to_record(challenge), node, MessageType.QUERY)
        for query in self._grid.push_messages([asking]):
            if query:
                self._queries[node], self.pending[node] = challenge, query

    def _take(self, node: int, reply: Message | Unreadable) -> None:
        if isinstance(reply, Message) and reply.has_error():
            _log.warning("node %d sent no card: %s", node, reply.error.reason)
            return
        try:
            member = Member(node, self._signed(_card_of(reply), self._queries[node]))
        except ReplyRejected as error:
            _log.warning("node %d sent no usable card: %s", node, error)
            return
        self._cards[node] = member
        if any(other.site == member.site for other in self._cards.values() if other is not member):
            _log.warning(
                "nodes %s call themselves %r, and node %d takes part; give each site file its own name, or find out "
                "whose the others are",
                sorted(other.node_id for other in self._cards.values() if other.site == member.site),
                member.site,
                self.members[member.site].node_id,
            )

    def _signed(self, card: SiteCard, challenge: bytes) -> SiteCard:
        """Return a card whose signature is right, and by the key that is known under its name.

        Raises:
            ReplyRejected: it is not.
        """
        wanted = self._keys.get(card.site)
        if wanted is not None and card.key != wanted:
            raise ReplyRejected(
                "wrong_key",
                f"it calls itself {card.site!r}, whose key is {wanted}, and its own is {card.key or 'none'}; find out "
                "whose it is. A site with new keys wants federation.site_keys corrected, or, on a resume, its old ones",
            )
        if card.key and not _is_signed(card, challenge):
            raise ReplyRejected("wrong_key", f"it calls itself {card.site!r}, and its signature is not of its key")
        return card


def _is_signed(card: SiteCard, challenge: bytes) -> bool:
    return VerifyingKey.from_hex(card.key).accepts(bytes.fromhex(card.signature), card.statement(challenge))
