"""Whom the server still has to tell that a round's update was not used."""

import pytest

from server.rounds import _still_unused


@pytest.mark.parametrize(
    ("before", "heard", "now", "after"),
    [
        ({}, {"harbor"}, ("eastfield",), {"eastfield": (3,)}),
        ({"eastfield": (2,)}, {"eastfield"}, (), {}),
        ({"eastfield": (2,)}, {"eastfield"}, ("eastfield",), {"eastfield": (3,)}),
        # Asked and not heard of: it was down, or busy, and has not read what it was told.
        ({"eastfield": (2,)}, {"harbor"}, (), {"eastfield": (2,)}),
        ({"eastfield": (2,)}, {"harbor"}, ("eastfield",), {"eastfield": (2, 3)}),
    ],
)
def test_a_site_is_told_until_it_was_heard_of(
    before: dict[str, tuple[int, ...]],
    heard: set[str],
    now: tuple[str, ...],
    after: dict[str, tuple[int, ...]],
) -> None:
    assert _still_unused(before, heard, now, 3) == after
