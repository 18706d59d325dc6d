"""Which data set this is: keyed hashes of its protected units, so that renaming or copying it resets no budget."""

from __future__ import annotations

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from protocol.errors import PrivacyError

__all__ = ["UNIT_HASH_BYTES", "DataIdentity", "identify", "overlapping"]

UNIT_HASH_BYTES = 16
_DOMAIN = b"cloister data set\x00"
_MARK = b"cloister mark\x00"
_WITH_MARKS = b"\x02"
_COUNT_BYTES = 4


@dataclass(frozen=True)
class DataIdentity:
    """The units of a data set, as keyed hashes of `UNIT_HASH_BYTES` bytes.

    `marks` are further hashes by which a record is known again in another shape; a unit may have any number of them.
    Without the site's secret nobody can test whether a given record is among either.
    """

    units: frozenset[bytes]
    marks: frozenset[bytes] = frozenset()

    @cached_property
    def packed(self) -> bytes:
        """The hashes, each kind in ascending order.

        Without marks: the units, one after the other, and nothing else. With marks: a byte 2, the number of units (four
        bytes, big-endian), units, marks. The lengths differ modulo `UNIT_HASH_BYTES`, so the two are told apart.
        """
        units = b"".join(sorted(self.units))
        if not self.marks:
            return units
        return _WITH_MARKS + len(self.units).to_bytes(_COUNT_BYTES, "big") + units + b"".join(sorted(self.marks))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the packed hashes: the same for the same units in any order, under any name."""
        return hashlib.sha256(_DOMAIN + self.packed).hexdigest()

    @classmethod
    def unpack(cls, packed: bytes) -> DataIdentity:
        """Return the identity whose `packed` is given; of other bytes, one whose fingerprint they do not have."""
        head = len(_WITH_MARKS) + _COUNT_BYTES
        if len(packed) % UNIT_HASH_BYTES != head or not packed.startswith(_WITH_MARKS):
            return cls(_hashes(packed))
        end = head + UNIT_HASH_BYTES * int.from_bytes(packed[len(_WITH_MARKS) : head], "big")
        return cls(_hashes(packed[head:end]), _hashes(packed[end:]))

    def overlaps(self, other: DataIdentity) -> bool:
        """Return whether at least one unit, or one mark of a unit, is in both."""
        return not (self.units.isdisjoint(other.units) and self.marks.isdisjoint(other.marks))


def identify(units: Iterable[bytes], key: bytes, marks: Iterable[bytes] = ()) -> DataIdentity:
    """Return the identity of a data set, given the canonical bytes of its units and marks, and the site's secret.

    Each unit becomes HMAC-SHA256(key, bytes), cut to `UNIT_HASH_BYTES`; a mark likewise, in a domain of its own. Units
    with the same bytes are one unit.

    Raises:
        PrivacyError: no unit; a data set without units would overlap with nothing and so always look unspent.
    """
    hashed = frozenset(hmac.digest(key, unit, "sha256")[:UNIT_HASH_BYTES] for unit in units)
    if not hashed:
        raise PrivacyError("a data set without a single unit has no identity; check data.source")
    return DataIdentity(hashed, frozenset(hmac.digest(key, _MARK + mark, "sha256")[:UNIT_HASH_BYTES] for mark in marks))


def overlapping(data_sets: Mapping[str, DataIdentity]) -> dict[str, frozenset[str]]:
    """Return, for each name, the names of the data sets that overlap with it, and its own: one pass over all hashes."""
    owners: defaultdict[tuple[str, bytes], list[str]] = defaultdict(list)
    for name, data in data_sets.items():
        for unit in data.units:
            owners["unit", unit].append(name)
        for mark in data.marks:
            owners["mark", mark].append(name)
    found = {name: {name} for name in data_sets}
    for together in set(map(tuple, owners.values())):
        for name in together:
            found[name].update(together)
    return {name: frozenset(names) for name, names in found.items()}


def _hashes(packed: bytes) -> frozenset[bytes]:
    return frozenset(packed[start : start + UNIT_HASH_BYTES] for start in range(0, len(packed), UNIT_HASH_BYTES))
