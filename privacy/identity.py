"""Which data set this is: keyed hashes of its protected units, so that renaming or copying it resets no budget."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from protocol.errors import PrivacyError

__all__ = ["UNIT_HASH_BYTES", "DataIdentity", "identify"]

UNIT_HASH_BYTES = 16
_DOMAIN = b"cloister data set\x00"


@dataclass(frozen=True)
class DataIdentity:
    """The units of a data set, as keyed hashes of `UNIT_HASH_BYTES` bytes.

    Without the site's secret nobody can test whether a given record is among them.
    """

    units: frozenset[bytes]

    @cached_property
    def packed(self) -> bytes:
        """The hashes in ascending order, one after the other."""
        return b"".join(sorted(self.units))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the sorted hashes: the same for the same units in any order, under any name."""
        return hashlib.sha256(_DOMAIN + self.packed).hexdigest()

    @classmethod
    def unpack(cls, packed: bytes) -> DataIdentity:
        """Return the identity whose `packed` is given."""
        return cls(
            frozenset(packed[start : start + UNIT_HASH_BYTES] for start in range(0, len(packed), UNIT_HASH_BYTES))
        )

    def overlaps(self, other: DataIdentity) -> bool:
        """Return whether at least one unit is in both."""
        return not self.units.isdisjoint(other.units)


def identify(units: Iterable[bytes], key: bytes) -> DataIdentity:
    """Return the identity of a data set, given the canonical bytes of each of its units and the site's secret.

    Each unit becomes HMAC-SHA256(key, bytes), cut to `UNIT_HASH_BYTES`. Units with the same bytes are one unit.

    Raises:
        PrivacyError: no unit; a data set without units would overlap with nothing and so always look unspent.
    """
    hashed = frozenset(hmac.digest(key, unit, "sha256")[:UNIT_HASH_BYTES] for unit in units)
    if not hashed:
        raise PrivacyError("a data set without a single unit has no identity; check data.source")
    return DataIdentity(hashed)
