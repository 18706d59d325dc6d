"""Every mode that a site enforces runs end to end, and says what it protected."""

from pathlib import Path
from typing import Any

import pytest

from conf.compose import compose_experiment
from privacy.accounting import epsilon_of
from privacy.mechanisms import SubsampledGaussian, Truncation
from simulations.simulate import simulate

BASIS = ("experiment=smoke", "federation.rounds=2", "evaluation.every=0", "data.partition.sites=[eastfield]")


def site_of(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    summary = simulate(compose_experiment([*BASIS, *overrides]), tmp_path / "run").summary
    return summary["sites"]["eastfield"]["privacy"]


def test_users_are_drawn_protected_and_booked_as_users(tmp_path: Path) -> None:
    """Eastfield's 1200 records are those of 825 patients, published as 830."""
    stated = site_of(
        tmp_path, "privacy=user_level", "privacy.insecure_seed=1", "federation.local.expected_batch_size=12"
    )
    assert stated["unit"] == "user"
    assert stated["relation"].startswith("add or remove one user of a site, with all of the user's records")
    assert stated["sampling_rate"] == pytest.approx(12 / 830)
    steps = stated["steps_executed"]
    executed = SubsampledGaussian(12 / 830, stated["noise_multiplier"], steps, Truncation(830, 36))
    assert stated["epsilon_run"] == pytest.approx(epsilon_of([executed], stated["delta"]))
    assert 7.9 < stated["epsilon_run"] <= 8


def test_integers_throughout(tmp_path: Path) -> None:
    stated = site_of(tmp_path, "privacy.noise=discrete", "privacy.insecure_seed=1")
    assert "Rényi" in stated["accountant"]
    assert 7.9 < stated["epsilon_run"] <= 8


def test_a_released_loss_is_charged(tmp_path: Path) -> None:
    """At the same ε the gradient's noise must grow when a noised loss leaves beside it."""
    alone = site_of(tmp_path / "alone", "privacy.insecure_seed=1")
    beside = site_of(tmp_path / "beside", "privacy.insecure_seed=1", "privacy.loss_noise_multiplier=2")
    assert beside["noise_multiplier"] > alone["noise_multiplier"]
    assert 7.9 < beside["epsilon_run"] <= 8


def test_layers_without_a_rule_are_trained_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    site_of(tmp_path, "privacy.per_example_gradients=opacus", "peft.targets=[embed_tokens]", "strategy=fedit")
    assert "no per-example gradient rule in opacus" in caplog.text
    assert "every layer is trained one by one instead" in caplog.text
