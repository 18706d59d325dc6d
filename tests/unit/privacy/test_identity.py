"""The same units are the same data set, whatever it is called and however it is ordered."""

import hashlib
import hmac

import pytest

from privacy.identity import UNIT_HASH_BYTES, DataIdentity, identify, overlapping
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


def test_a_shared_mark_is_an_overlap_and_no_unit() -> None:
    one, other = identify([b"a"], KEY, [b"m"]), identify([b"b"], KEY, [b"m", b"n"])
    assert one.overlaps(other)
    assert not identify([b"a"], KEY, [b"b"]).overlaps(identify([b"b"], KEY, [b"a"]))
    assert len(other.units) == 1


def test_packing_with_marks_loses_nothing_and_is_told_from_packing_without() -> None:
    marked = identify([b"a", b"b"], KEY, [b"m"])
    assert DataIdentity.unpack(marked.packed) == marked
    assert marked.fingerprint != identify([b"a", b"b"], KEY).fingerprint
    assert len(marked.packed) % UNIT_HASH_BYTES != 0


def test_other_bytes_never_have_the_fingerprint() -> None:
    for marks in ([], [b"m", b"n"]):
        data = identify([b"a", b"b", b"c"], KEY, marks)
        for damaged in (data.packed[:-1], data.packed[16:], data.packed[:-16], data.packed + b"\0", b"", b"\x02"):
            assert DataIdentity.unpack(damaged).fingerprint != data.fingerprint


def test_overlaps_of_many_are_those_of_each_pair() -> None:
    sets = {
        str(number): identify([str(number).encode()], KEY, [str(number // 3).encode()] if number % 2 else [])
        for number in range(9)
    }
    sets["all"] = identify([str(number).encode() for number in range(4)], KEY)
    assert overlapping(sets) == {
        name: frozenset(other for other in sets if data.overlaps(sets[other])) for name, data in sets.items()
    }
    assert overlapping({}) == {}


def test_no_unit_is_no_data_set() -> None:
    with pytest.raises(PrivacyError, match=r"a data set without a single unit has no identity; check data\.source"):
        identify([], KEY)
