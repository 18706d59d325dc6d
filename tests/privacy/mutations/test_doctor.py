"""The doctor finds nothing wrong with a healthy program."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conf.schema.experiment import Experiment
from privacy.doctor.diagnosis import diagnose, exit_code
from privacy.doctor.subject import Subject
from protocol.errors import ConfigError, SiteRefusal
from protocol.refusals import sentence
from simulations.doctor import observe_site

RECORDS_TOO = "privacy.local={kind: example_level, target_epsilon: 8.0}"


@pytest.mark.parametrize(
    ("overrides", "not_examined"),
    [
        (("privacy=example_level",), {23, 27}),
        (("privacy=user_level", "federation.local.expected_batch_size=5"), {23, 27}),
        (("privacy.noise=discrete",), {23, 27}),
        (("privacy.loss_noise_multiplier=20",), {23}),
        (("privacy=client_level",), {13, 15, 16, 18, 20, 21, 24, 25, 26, 27, 28}),
        (("privacy=client_level", "privacy.clipping.kind=adaptive", RECORDS_TOO), {27}),
        (
            ("privacy=none", "federation.release_training_loss=true"),
            {13, 15, 16, 18, 20, 21, 22, 23, 24, 25, 26, 27, 28},
        ),
    ],
    ids=["record", "user", "discrete", "loss", "site", "site-and-record", "none"],
)
def test_a_healthy_program_passes_every_check(
    overrides: tuple[str, ...], not_examined: set[int], observe: Callable[..., Subject]
) -> None:
    """Twenty checks at an error rate of 1e-6 at most each: fails once in 50,000 runs."""
    verdicts = diagnose(observe(*overrides))
    assert exit_code(verdicts.items()) == 0, verdicts
    assert {code for code, verdict in verdicts.items() if verdict.passed is None} == not_examined


@pytest.mark.parametrize("batch", ["8", "1e9"], ids=["some", "all"])
def test_a_healthy_head_on_summaries_passes_every_check(
    batch: str, head_alone: tuple[str, ...], observe: Callable[..., Subject]
) -> None:
    verdicts = diagnose(observe(*head_alone, f"federation.local.expected_batch_size={batch}"))
    assert exit_code(verdicts.items()) == 0, verdicts


def test_there_must_be_a_site(configure: Callable[..., Experiment], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no site to examine: data\.partition leaves none"):
        observe_site(configure(), {}, tmp_path)


def test_a_site_needs_two_units(configure: Callable[..., Experiment], tmp_path: Path) -> None:
    """Two records of one user are one."""
    parts = {"here": [{"text": "sore throat", "user": "u0"}, {"text": "fever", "user": "u0"}]}
    with pytest.raises(ConfigError, match=r"site here holds 1 protected unit; .* so 2 or more are needed"):
        observe_site(configure("privacy=user_level"), parts, tmp_path)


def test_a_refusal_is_told_with_its_reason(observe: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise SiteRefusal("outside_hours", "not today")

    monkeypatch.setattr("client.rounds.check_policy", closed)
    wanted = r"the examined site refuses round 1 \(outside_hours\): " + sentence("outside_hours")
    with pytest.raises(ConfigError, match=wanted):
        observe()
