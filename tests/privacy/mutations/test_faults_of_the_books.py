"""Faults of accounting and release, planted into the real code while one test runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import client.rounds
import client.site
import privacy.plan
import simulations.doctor
from privacy.plan import PrivacyPlan

Plant = Callable[[str, object], None]
Catches = Callable[[int], None]


@pytest.mark.fault("accountant reset each round")
def test_accountant_reset_each_round(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The stated ε counts the last round alone."""
    real = PrivacyPlan.epsilon
    monkeypatch.setattr(PrivacyPlan, "epsilon", lambda self, mechanisms: real(self, list(mechanisms)[-1:]))
    catches(20)


@pytest.mark.fault("expected instead of executed participation")
def test_expected_instead_of_executed_participation(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """A site that is asked in half of the rounds, on average, books half of the steps that it takes."""
    real = PrivacyPlan.mechanism
    monkeypatch.setattr(PrivacyPlan, "mechanism", lambda self, steps: real(self, max(steps // 2, 1)))
    catches(18)


@pytest.mark.fault("δ per step")
def test_delta_per_step(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The noise is calibrated as if each step had a δ of its own; the run's δ is then steps times larger."""
    real = privacy.plan.calibrate_noise
    monkeypatch.setattr(
        privacy.plan,
        "calibrate_noise",
        lambda target, delta, mechanism: real(target, min(delta * mechanism.steps, 0.5), mechanism),
    )
    catches(21)


@pytest.mark.fault("metric released in clear")
def test_metric_released_in_clear(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The mean training loss goes along with the update."""
    monkeypatch.setattr(client.rounds, "_released", lambda diagnostics, *_: {"training_loss": diagnostics.mean_loss})
    catches(22)


@pytest.mark.fault("records of one user sold as user-level")
def test_records_of_one_user_sold_as_user_level(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """A plan says that users are protected, while each of a user's records is drawn and clipped on its own."""
    real = client.rounds.build_plan

    def relabeled(*arguments: Any, **options: Any) -> PrivacyPlan:
        return replace(real(*arguments, **options), unit="user", relation="add or remove one user of a site")

    monkeypatch.setattr(client.rounds, "build_plan", relabeled)
    monkeypatch.setattr(simulations.doctor, "users_column", lambda _experiment: "user")
    catches(13)
