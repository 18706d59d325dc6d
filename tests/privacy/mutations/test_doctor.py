"""The doctor finds nothing wrong with a healthy program."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conf.schema.experiment import Experiment
from privacy.doctor.diagnosis import diagnose, exit_code
from privacy.doctor.subject import Subject
from protocol.errors import ConfigError, SiteRefusal
from simulations.doctor import observe_site


def test_a_healthy_program_passes_every_check(observe: Callable[[], Subject]) -> None:
    """Thirteen checks at an error rate of 1e-6 at most each: fails once in 70,000 runs."""
    verdicts = diagnose(observe())
    assert all(verdict.passed for verdict in verdicts.values()), verdicts
    assert exit_code(verdicts.items()) == 0


def test_there_must_be_a_site(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no site to examine: data\.partition leaves none"):
        observe_site(experiment, {}, tmp_path)


def test_a_refusal_is_told_with_its_reason(observe: Callable[[], Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise SiteRefusal("closed", "not today")

    monkeypatch.setattr("client.rounds.check_policy", closed)
    with pytest.raises(ConfigError, match=r"the examined site refuses round 1 \(closed\): not today"):
        observe()
