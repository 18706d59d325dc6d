"""The hash chain: what an entry is, how it is sealed, and how the first broken one is found.

An entry's hash covers everything in it and the hash of the entry before; its signature covers the hash. So no entry can
be altered, removed from the middle, inserted or moved without the site's private key. Whoever holds that key can write
another chain altogether, and anybody can cut the chain's tail; both show only against a head that was noted elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

from privacy.ledger.keys import SigningKey, VerifyingKey
from privacy.ledger.payloads import payload_problem

__all__ = [
    "GENESIS",
    "READABLE_VERSIONS",
    "SCHEMA_VERSION",
    "Entry",
    "Fault",
    "Kind",
    "canonical_json",
    "first_fault",
    "seal",
]

SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
"""Version 1 knew data sets without marks, and the filter's order followed from the budget alone. Up to version 2 the
order changed with the budget's δ, and people were known by the values of the user column as they were spelled."""
GENESIS = "0" * 64
"""What the first entry names as the hash before it."""

Kind = Literal["budget", "schedule", "reserve", "commit"]

_SIGNED = b"cloister ledger entry\x00"


@dataclass(frozen=True)
class Entry:
    """One line of a ledger, as stored."""

    sequence: int
    """From 1, without gaps."""
    previous: str
    kind: str
    at: str
    """ISO 8601 with offset, by the site's clock."""
    schema_version: int
    fingerprint: str
    """The data set that the entry concerns; empty for a budget, which holds for all of them."""
    payload: str
    """Canonical JSON."""
    key_id: str
    hash: str
    """SHA-256 (hex) of the canonical JSON of all fields above."""
    signature: str
    """Ed25519 (hex), of the hash."""

    @cached_property
    def content(self) -> dict[str, Any]:
        """The payload, read."""
        return json.loads(self.payload)

    @property
    def expected_hash(self) -> str:
        """The hash that the other fields give."""
        covered = {name: getattr(self, name) for name in _COVERED}
        return hashlib.sha256(canonical_json(covered).encode()).hexdigest()

    def is_signed_by(self, key: VerifyingKey) -> bool:
        """Return whether the signature is `key`'s, on this entry's hash."""
        try:
            signature = bytes.fromhex(self.signature)
        except ValueError:
            return False
        return key.accepts(signature, _SIGNED + self.hash.encode())


_COVERED = tuple(field.name for field in fields(Entry) if field.name not in ("hash", "signature"))


@dataclass(frozen=True)
class Fault:
    """What is wrong with an entry, for a person."""

    kind: Literal["altered", "missing", "reordered", "signature", "version", "content"]
    sequence: int
    text: str


def canonical_json(value: Mapping[str, Any]) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, shortest round-trip floats; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def seal(
    key: SigningKey, last: Entry | None, kind: Kind, at: datetime, fingerprint: str, content: Mapping[str, Any]
) -> Entry:
    """Return the entry that follows `last`, hashed and signed."""
    draft = Entry(
        sequence=1 if last is None else last.sequence + 1,
        previous=GENESIS if last is None else last.hash,
        kind=kind,
        at=at.isoformat(),
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint,
        payload=canonical_json(content),
        key_id=key.key_id,
        hash="",
        signature="",
    )
    hashed = replace(draft, hash=draft.expected_hash)
    return replace(hashed, signature=key.sign(_SIGNED + hashed.hash.encode()).hex())


def first_fault(
    entries: Sequence[Entry], key: VerifyingKey | None, trusted: frozenset[str] = frozenset()
) -> Fault | None:
    """Return what is wrong with the first entry that is not as it was written; None for an intact chain.

    Args:
        entries: all of them, by sequence number.
        key: the site's public key; None leaves the signatures unchecked.
        trusted: hashes whose signature was checked before; hashes and order are checked always.
    """
    previous = GENESIS
    for expected, entry in enumerate(entries, 1):
        fault = _fault(entry, expected, previous, key, entry.hash in trusted)
        if fault is not None:
            return fault
        previous = entry.hash
    return None


def _fault(entry: Entry, expected: int, previous: str, key: VerifyingKey | None, trusted: bool) -> Fault | None:
    number = entry.sequence
    if number != expected:
        return Fault("missing", expected, f"entry {expected} is missing: entry {number} stands in its place")
    if entry.hash != entry.expected_hash:
        return _altered(entry)
    if entry.previous != previous:
        return Fault(
            "reordered",
            number,
            f"entry {number} does not follow what stands before it: that was replaced, removed or moved",
        )
    if key is not None and entry.key_id != key.key_id:
        return Fault(
            "signature", number, f"entry {number} names key {entry.key_id}, which is not the site's {key.key_id}"
        )
    if key is not None and not trusted and not entry.is_signed_by(key):
        return Fault(
            "signature", number, f"the signature of entry {number} is not the site's: it was forged or damaged"
        )
    if entry.schema_version not in READABLE_VERSIONS:
        *older, newest = map(str, READABLE_VERSIONS)
        readable = f"{', '.join(older)} and {newest}"
        text = f"entry {number} has schema version {entry.schema_version}, this release reads {readable}"
        return Fault("version", number, f"{text}; install the release that wrote it, or a later one")
    problem = payload_problem(entry.kind, entry.payload)
    if problem is not None:
        return Fault("content", number, f"entry {number} cannot be read: {problem}")
    return None


def _altered(entry: Entry) -> Fault:
    # An entry that was only given another number still has the hash of its old one.
    for original in range(1, entry.sequence + 1000):
        if replace(entry, sequence=original).expected_hash == entry.hash:
            text = f"entry {entry.sequence} was written as entry {original}: entries were moved, removed or inserted"
            return Fault("reordered", entry.sequence, text)
    return Fault("altered", entry.sequence, f"entry {entry.sequence} was altered: its content does not give its hash")
