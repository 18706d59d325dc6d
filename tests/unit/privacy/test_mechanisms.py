"""A mechanism survives JSON, and what is none is refused."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.mechanisms import SubsampledGaussian, Truncation
from protocol.errors import PrivacyError

truncations = st.none() | st.builds(Truncation, st.integers(1, 10**9), st.integers(1, 10**6))
mechanisms = st.builds(
    SubsampledGaussian,
    st.floats(1e-12, 1.0),
    st.floats(0.0, 1e6),
    st.integers(0, 10**9),
    truncations,
    st.booleans(),
)


@given(mechanisms)
def test_json_keeps_every_bit(mechanism: SubsampledGaussian) -> None:
    assert SubsampledGaussian.from_json(json.loads(json.dumps(mechanism.to_json()))) == mechanism


def test_json_is_readable_and_the_two_last_fields_may_be_left_out() -> None:
    mechanism = SubsampledGaussian(0.1, 1.5, 3, Truncation(1000, 300))
    assert mechanism.to_json() == {
        "sampling_rate": 0.1,
        "noise_multiplier": 1.5,
        "steps": 3,
        "truncation": {"slots": 1000, "cap": 300},
        "discrete": False,
    }
    plain = {"sampling_rate": 0.1, "noise_multiplier": 1.5, "steps": 3}
    assert SubsampledGaussian.from_json(plain) == SubsampledGaussian(0.1, 1.5, 3)


@pytest.mark.parametrize(
    ("stored", "complaint"),
    [
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0}, "steps"),
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 1, "matrix": [1]}, "matrix"),
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 1, "truncation": {"slots": 1}}, "cap"),
        ({"sampling_rate": "a", "noise_multiplier": 1.0, "steps": 1}, "sampling_rate='a', expected a finite number"),
        ({"sampling_rate": True, "noise_multiplier": 1.0, "steps": 1}, "sampling_rate=True, expected a finite number"),
        ({"sampling_rate": 0.1, "noise_multiplier": 10**400, "steps": 1}, "an integer beyond 2.200, expected a finite"),
        (
            {"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 2.5},
            "steps=2.5, expected a whole number of at most",
        ),
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": True}, "steps=True, expected a whole number"),
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 10**9 + 1}, "expected a whole number of at most 1e"),
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": -(10**5000)}, "steps=an integer beyond"),
        (
            {"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 1, "truncation": [1, 1]},
            r"truncation=\[1, 1\], exp",
        ),
        (
            {"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 1, "truncation": {"slots": 10**30, "cap": 1}},
            "truncation.slots=1000.*, expected a whole number",
        ),
        ({"sampling_rate": 0.1, "noise_multiplier": 1.0, "steps": 1, "discrete": 1}, "discrete=1, expected true or"),
    ],
)
def test_what_cannot_be_read_is_refused(stored: dict[str, object], complaint: str) -> None:
    """An unknown key above all: its cost would be unknown too."""
    with pytest.raises(PrivacyError, match=f"the stored mechanism cannot be read: .*{complaint}"):
        SubsampledGaussian.from_json(stored)


@pytest.mark.parametrize(
    "fields", [(0.1, 1.0, -1), (0.0, 1.0, 1), (1.1, 1.0, 1), (0.1, -1.0, 1), (0.1, math.nan, 1), (0.1, math.inf, 1)]
)
def test_what_is_no_mechanism_is_refused(fields: tuple[float, float, int]) -> None:
    """Negative steps, above all: booked in a ledger they would give budget back."""
    with pytest.raises(PrivacyError, match=r"is no mechanism: rate in \(0, 1\], noise >= 0, steps >= 0"):
        SubsampledGaussian(*fields)


@pytest.mark.parametrize(("slots", "cap"), [(0, 1), (1, 0), (-1, 1)])
def test_what_is_no_truncation_is_refused(slots: int, cap: int) -> None:
    with pytest.raises(PrivacyError, match="is no truncation: slots >= 1, cap >= 1"):
        Truncation(slots, cap)


def test_repeated_changes_the_steps_alone() -> None:
    mechanism = SubsampledGaussian(0.1, 1.5, 3, Truncation(1000, 300), discrete=True)
    assert mechanism.repeated(7) == SubsampledGaussian(0.1, 1.5, 7, Truncation(1000, 300), discrete=True)
