"""The faults that tests inject, what holds after each, and the test that shows it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

__all__ = ["FAULTS", "Fault", "inject", "print_faults"]

_ROOT = Path(__file__).resolve().parents[1]

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
_CLOCK = f"{_SITE}test_faults.py::test_a_clock_that_moves_while_the_site_runs"

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
    Fault(
        "ServerApp killed while sites train, and after a checkpoint",
        "resumed; nothing charged twice",
        f"{_ORG}test_organizations.py::test_a_killed_server_app_is_resumed_from_its_checkpoint_and_asks_sites_for_nothing_twice",
    ),
    Fault("server killed at six moments of a round", "resumed to the same adapter, bit for bit", _RESUME),
    Fault(
        "resumed while a site is still at work",
        "the site answers when it is done",
        "tests/unit/client/test_desk.py::test_the_same_question_in_the_middle_of_its_work_waits_for_the_answer",
    ),
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
        "no valid reply in a whole run of secret cohorts",
        "the run fails at its end",
        "tests/rounds/test_client_level.py::test_noise_alone_is_not_handed_out_as_an_adapter",
    ),
    Fault(
        "disk full at the site",
        "`ledger_unusable` before training",
        f"{_SITE}test_faults.py::test_a_full_disk_is_refused_before_training",
    ),
    Fault("ledger missing, truncated, altered, set back", "`ledger_unusable`", _LEDGER),
    Fault(
        "all of a site older than what the server has seen",
        "`ledger_set_back`",
        "tests/rounds/test_ledger_heads.py::test_a_site_that_is_older_than_what_the_server_has_seen_refuses",
    ),
    Fault("clock set back, hours over, budget expired", "a code each, nothing spent", _CLOCK),
    Fault(
        "two servers at once",
        "the second is told `busy`",
        f"{_SITE}test_process.py::test_a_second_server_is_told_busy_and_a_killed_round_counts",
    ),
    Fault("wrong base, weaker privacy, unknown field, enormous rank, path in a name", "a code each", _MALICIOUS),
    Fault("frame of 2^62 bytes announced", "`oversized_frame`, nothing allocated", _MALICIOUS),
    Fault(
        "NaN, forged header, huge count, oversized message through real sockets",
        "a code each, not used",
        f"{_ORG}test_organizations.py::test_forged_replies_are_named_by_their_codes_and_never_used",
    ),
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


def inject(faults: Sequence[Fault] = FAULTS, root: Path = _ROOT) -> dict[str, str]:
    """Run the tests of `faults` and return what became of each: survived, NOT SURVIVED, or why it was not injected.

    Args:
        faults: lines of the table.
        root: of the repository, which has the tests; an installed package has none.
    """
    tests = sorted({fault.test for fault in faults})
    if importlib.util.find_spec("pytest") is None or not (root / "tests").is_dir():
        return dict.fromkeys(tests, "not injected: no tests here, or no pytest")
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {ended.returncode}:\n{(ended.stdout + ended.stderr)[-3000:]}")
        cases = ElementTree.parse(report).getroot().findall(".//testcase")
    return {test: _outcome([case for case in cases if _is_of(case, test)]) for test in tests}


def _is_of(case: ElementTree.Element, test: str) -> bool:
    """Return whether a result is one of a test, whose name may stand there with parameters."""
    path, name = test.split("::")
    module = path.removesuffix(".py").replace("/", ".")
    return case.get("classname") == module and str(case.get("name")).partition("[")[0] == name


def _outcome(cases: Sequence[ElementTree.Element]) -> str:
    if not cases or any(case.find(kind) is not None for case in cases for kind in ("failure", "error")):
        return "NOT SURVIVED"
    skipped = [found for case in cases if (found := case.find("skipped")) is not None]
    return f"not injected: {skipped[0].get('message')}" if skipped else "survived"


def print_faults(outcomes: Mapping[str, str]) -> None:
    """Print the table; `outcomes` are those of `inject`."""
    from rich.console import Console
    from rich.table import Table

    survived = sum(outcomes[fault.test] == "survived" for fault in FAULTS)
    table = Table(title=f"faults injected here and survived: {survived} of {len(FAULTS)}")
    for heading in ("fault", "what must hold", "test", "here"):
        table.add_column(heading, overflow="fold")
    for fault in FAULTS:
        table.add_row(fault.injected, fault.holds, fault.test.split("::")[1], outcomes[fault.test])
    Console().print(table)
