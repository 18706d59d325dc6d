"""The doctor finds nothing wrong with a healthy program."""

from collections.abc import Callable

from privacy.doctor.diagnosis import diagnose, exit_code
from privacy.doctor.subject import Subject


def test_a_healthy_program_passes_every_check(observe: Callable[[], Subject]) -> None:
    """Thirteen checks at an error rate of 1e-6 at most each: fails once in 70,000 runs."""
    verdicts = diagnose(observe())
    assert all(verdict.passed for verdict in verdicts.values()), verdicts
    assert exit_code(verdicts.items()) == 0
