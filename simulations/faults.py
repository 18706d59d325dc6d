"""The faults that tests inject, what holds after each, and the test that shows it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAULTS", "Fault", "print_faults"]

_SITE, _ORG = "tests/deployment/site/", "tests/deployment/organizations/"


@dataclass(frozen=True)
class Fault:
    """One line of the table."""

    injected: str
    holds: str
    test: str
    """`PATH::NAME`."""


_MALICIOUS = f"{_SITE}test_faults.py::test_malicious_instructions_are_refused_and_the_site_goes_on"
_LEDGER = f"{_SITE}test_faults.py::test_a_ledger_that_is_not_as_it_was_left_is_refused"
_RESUME = "tests/rounds/test_resume.py::test_a_killed_run_goes_on_to_the_same_adapter"
_REPLIES = "tests/rounds/test_rejected_replies.py::"
_STATE = "tests/unit/client/test_desk.py::test_hours_expiry_clock_and_disk"

FAULTS: tuple[Fault, ...] = (
    Fault(
        "site killed in training",
        "counted as spent; the run goes on",
        f"{_ORG}test_organizations.py::test_a_killed_site_is_down_for_the_server_and_has_lost_nothing",
    ),
    Fault(
        "site killed between commit and answer",
        "same reply, booked once",
        f"{_SITE}test_process.py::test_killed_at_the_commit_a_round_is_answered_once_and_booked_once",
    ),
    Fault(
        "site away for a round, and back",
        "takes part again",
        f"{_ORG}test_organizations.py::test_each_round_used_the_sites_that_could_answer",
    ),
    Fault(
        "site hangs",
        "`site_silent` after a minute",
        "tests/unit/client/test_relay.py::test_a_process_that_hangs_is_silent",
    ),
    Fault(
        "slow upload of one site",
        "the others are not held up; it is told",
        "tests/rounds/test_late_replies.py::test_a_slow_upload_holds_up_nobody_and_its_site_is_told",
    ),
    Fault(
        "SuperLink killed in a round",
        "same adapter, bit for bit",
        f"{_ORG}test_organizations.py::test_the_adapter_is_that_of_the_same_sites_in_one_process",
    ),
    Fault("server killed at six moments of a round", "resumed to the same adapter, bit for bit", _RESUME),
    Fault(
        "checkpoint damaged, or of another run",
        "passed over; the round before it is used",
        "tests/rounds/test_resume.py::test_a_damaged_or_foreign_checkpoint_is_passed_over",
    ),
    Fault(
        "no valid reply at all",
        "the run fails loudly",
        "tests/rounds/test_late_replies.py::test_no_valid_reply_at_all_fails_loudly",
    ),
    Fault(
        "disk full at the site",
        "`ledger_unusable` before training",
        f"{_SITE}test_faults.py::test_a_full_disk_is_refused_before_training",
    ),
    Fault("ledger missing, truncated, altered, set back", "`ledger_unusable`", _LEDGER),
    Fault("clock set back, hours over, budget expired", "a code each, nothing spent", _STATE),
    Fault(
        "two servers at once",
        "the second is told `busy`",
        f"{_SITE}test_process.py::test_a_second_server_is_told_busy_and_a_killed_round_counts",
    ),
    Fault("wrong base, weaker privacy, unknown field, enormous rank, path in a name", "a code each", _MALICIOUS),
    Fault("frame of 2^62 bytes announced", "`oversized_frame`, nothing allocated", _MALICIOUS),
    Fault(
        "reply with NaN, another shape, round, site or plan",
        "not used; the round goes on",
        f"{_REPLIES}test_a_bad_reply_is_named_and_the_round_goes_on",
    ),
    Fault(
        "forged, pickled or truncated tensors",
        "not used; the round goes on",
        f"{_REPLIES}test_a_forged_payload_is_named_and_the_round_goes_on",
    ),
    Fault(
        "too many tensors in a message",
        "refused before they are read",
        "tests/unit/protocol/test_records.py::test_too_many_tensors_are_rejected_before_they_are_read",
    ),
    Fault(
        "bundle that a site does not list",
        "not even unpacked",
        "tests/deployment/test_site_bundles.py::test_an_unlisted_bundle_never_runs",
    ),
    Fault(
        "node without a registered key",
        "not let in",
        f"{_ORG}test_organizations.py::test_a_node_key_that_was_not_registered_is_refused",
    ),
)


def print_faults() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="faults that tests inject, and what holds")
    for heading in ("fault", "holds", "test"):
        table.add_column(heading)
    for fault in FAULTS:
        table.add_row(fault.injected, fault.holds, fault.test.split("::")[1])
    Console().print(table)
