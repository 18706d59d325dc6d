"""The same units are the same data set, whatever it is called and however it is ordered."""

import hashlib
import hmac

import pytest

from privacy.identity import UNIT_HASH_BYTES, DataIdentity, identify
from protocol.errors import PrivacyError

KEY = b"k" * 32


def test_order_and_repetition_do_not_matter_and_every_unit_does() -> None:
    one = identify([b"a", b"b", b"c"], KEY)
    assert identify([b"c", b"a", b"b", b"a"], KEY).fingerprint == one.fingerprint
    assert identify([b"a", b"b"], KEY).fingerprint != one.fingerprint
    assert identify([b"a", b"b", b"d"], KEY).fingerprint != one.fingerprint


def test_without_the_secret_no_record_can_be_looked_up() -> None:
    assert identify([b"a"], KEY).units == {hmac.new(KEY, b"a", hashlib.sha256).digest()[:UNIT_HASH_BYTES]}
    assert not identify([b"a"], KEY).overlaps(identify([b"a"], b"other" * 7))


def test_overlap_is_one_shared_unit() -> None:
    assert identify([b"a", b"b"], KEY).overlaps(identify([b"b", b"c"], KEY))
    assert not identify([b"a", b"b"], KEY).overlaps(identify([b"c"], KEY))


def test_packing_loses_nothing() -> None:
    one = identify((str(number).encode() for number in range(1000)), KEY)
    assert len(one.packed) == 1000 * UNIT_HASH_BYTES
    assert DataIdentity.unpack(one.packed) == one


def test_no_unit_is_no_data_set() -> None:
    with pytest.raises(PrivacyError, match=r"a data set without a single unit has no identity; check data\.source"):
        identify([], KEY)
