"""Faults of accounting and release, planted into the real code while one test runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import client.rounds
import client.site
import client.wire
import privacy.ledger.ledger
import privacy.plan
from client.units import units_of
from conf.schema.privacy import ExampleLevel
from privacy.plan import PrivacyPlan

Plant = Callable[[str, object], None]
Catches = Callable[..., None]


@pytest.mark.fault("accountant reset each round")
def test_accountant_reset_each_round(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """The stated ε counts the last round alone."""
    real = privacy.ledger.ledger.charges_of
    monkeypatch.setattr(privacy.ledger.ledger, "charges_of", lambda entries, data: real(entries, data)[-1:])
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
    monkeypatch.setattr(
        client.rounds, "_released", lambda trained, _job: {"training_loss": trained.diagnostics.mean_loss}
    )
    catches(22)


@pytest.mark.fault("records of one user sold as user-level")
def test_records_of_one_user_sold_as_user_level(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """A plan says that users are protected, while each of a user's records is drawn and clipped on its own."""

    def of_records(rows: object, _privacy: object, *rest: object) -> object:
        return units_of(rows, ExampleLevel(noise_multiplier=1.0), *rest)

    monkeypatch.setattr(client.site, "units_of", of_records)
    # Where every user publishes a slot, more records than slots are refused before anything is trained.
    monkeypatch.setattr(privacy.plan, "_refuse_too_few_slots", lambda *_: None)
    catches(13, "privacy=user_level", "federation.local.expected_batch_size=5")


@pytest.mark.fault("a site's update sent unclipped")
def test_update_sent_unclipped(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Client-level: the server adds noise for the clip norm to an update that is longer."""
    monkeypatch.setattr(client.wire, "clip_update", lambda update, _clip_norm: (dict(update), True))
    catches(23, "privacy=client_level")


@pytest.mark.fault("a site's tensors clipped one by one")
def test_tensors_of_an_update_clipped_one_by_one(monkeypatch: pytest.MonkeyPatch, catches: Catches) -> None:
    """Client-level: each tensor of the update has the clip norm, so all of them together have C·√(tensors)."""
    real = client.wire.clip_update

    def one_by_one(update: dict[str, object], clip_norm: float) -> tuple[dict[str, object], bool]:
        return {name: real({name: tensor}, clip_norm)[0][name] for name, tensor in update.items()}, False

    monkeypatch.setattr(client.wire, "clip_update", one_by_one)
    catches(23, "privacy=client_level")
