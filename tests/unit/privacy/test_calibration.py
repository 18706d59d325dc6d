"""Noise for a target: never above it, hardly below."""

import pytest

from privacy.accounting import epsilon_of
from privacy.calibration import calibrate_noise
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import PrivacyError


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [
        (1.0, 1e-5, 0.01, 300),
        (3.0, 1e-5, 0.01, 300),
        (8.0, 1e-5, 0.01, 300),
        (8.0, 1e-4, 0.064, 40),
        (0.5, 1e-6, 0.2, 20),
        (1.0, 1e-5, 1.0, 1),
        (50.0, 1e-5, 0.5, 3),
        # A coarse grid overstates these by half and by a quarter: noise calibrated on it would be far too large.
        (0.1, 1e-6, 1e-3, 3000),
        (0.2, 1e-6, 1e-4, 8000),
    ],
)
def test_the_target_is_met_and_not_missed(target: float, delta: float, rate: float, steps: int) -> None:
    noise = calibrate_noise(target, delta, SubsampledGaussian(rate, 1.0, steps))
    reached = epsilon_of([SubsampledGaussian(rate, noise, steps)], delta)
    assert (0.998 if rate > 1e-3 else 0.995) * target <= reached <= target
    # No part of the run costs more than all of it, so a ledger whose budget is the target lets the run finish.
    powers = [1 << bits for bits in range(steps.bit_length())]
    assert all(epsilon_of([SubsampledGaussian(rate, noise, part)], delta) <= target for part in powers)


def test_figures_measured_elsewhere() -> None:
    """10,000 records, batch 100, 300 steps, δ = 1e-5: 1.0276, 0.7061 and 0.5138 for ε = 1, 3 and 8."""
    noises = [calibrate_noise(epsilon, 1e-5, SubsampledGaussian(0.01, 1.0, 300)) for epsilon in (1.0, 3.0, 8.0)]
    assert noises == pytest.approx([1.0276, 0.7061, 0.5138], rel=2e-3)


@pytest.mark.slow
def test_a_run_just_past_a_power_of_two_can_be_finished() -> None:
    """The accountant's grid changes at 1024 steps, where its ε is a little larger than at 1025."""
    noise = calibrate_noise(0.0328, 1e-6, SubsampledGaussian(1e-4, 1.0, 1025))
    reached = [epsilon_of([SubsampledGaussian(1e-4, noise, steps)], 1e-6) for steps in (1000, 1023, 1024, 1025)]
    assert max(reached) <= 0.0328
    assert reached[-1] >= 0.99 * 0.0328


def test_more_is_asked_for_less() -> None:
    base = calibrate_noise(2.0, 1e-5, SubsampledGaussian(0.02, 1.0, 50))
    assert calibrate_noise(1.0, 1e-5, SubsampledGaussian(0.02, 1.0, 50)) > base
    assert calibrate_noise(2.0, 1e-6, SubsampledGaussian(0.02, 1.0, 50)) > base
    assert calibrate_noise(2.0, 1e-5, SubsampledGaussian(0.04, 1.0, 50)) > base
    assert calibrate_noise(2.0, 1e-5, SubsampledGaussian(0.02, 1.0, 100)) > base


def test_noise_has_a_floor() -> None:
    noise = calibrate_noise(100.0, 1e-2, SubsampledGaussian(1e-3, 1.0, 1))
    assert noise == 0.2
    assert epsilon_of([SubsampledGaussian(1e-3, noise, 1)], 1e-2) < 100.0


def test_an_impossible_target_is_refused_with_its_figures() -> None:
    with pytest.raises(
        PrivacyError,
        match=r"target_epsilon=0\.001 at delta=1e-09 is too small for 10000 steps at sampling rate 1: even a noise "
        r"multiplier of 1000 costs more; ask for a larger ε or fewer steps",
    ):
        calibrate_noise(0.001, 1e-9, SubsampledGaussian(1.0, 1.0, 10_000))
