"""Noise for a target: never above it, hardly below."""

from dataclasses import replace

import pytest

from privacy.accounting import epsilon_of
from privacy.calibration import calibrate_noise
from privacy.mechanisms import SubsampledGaussian, Truncation
from protocol.errors import PrivacyError


@pytest.mark.parametrize(
    ("target", "delta", "mechanism"),
    [
        (1.0, 1e-5, SubsampledGaussian(0.01, 1.0, 300)),
        (8.0, 1e-5, SubsampledGaussian(0.01, 1.0, 300)),
        (8.0, 1e-4, SubsampledGaussian(0.064, 1.0, 40)),
        (0.5, 1e-6, SubsampledGaussian(0.2, 1.0, 20)),
        (1.0, 1e-5, SubsampledGaussian(1.0, 1.0, 7)),
        (50.0, 1e-5, SubsampledGaussian(0.5, 1.0, 3)),
        (3.0, 1e-5, SubsampledGaussian(0.02, 1.0, 200, Truncation(800, 32))),
        (3.0, 1e-5, SubsampledGaussian(0.02, 1.0, 200, discrete=True)),
        (3.0, 1e-5, SubsampledGaussian(0.02, 1.0, 200, Truncation(800, 32), discrete=True)),
        (1.0, 1e-5, SubsampledGaussian(1.0, 1.0, 7, discrete=True)),
        # A coarse grid overstates these by half and by a quarter: noise calibrated on it would be far too large.
        (0.1, 1e-6, SubsampledGaussian(1e-3, 1.0, 3000)),
        pytest.param(0.2, 1e-6, SubsampledGaussian(1e-4, 1.0, 8000), marks=pytest.mark.slow),
    ],
)
def test_the_target_is_met_and_not_missed(target: float, delta: float, mechanism: SubsampledGaussian) -> None:
    made = replace(mechanism, noise_multiplier=calibrate_noise(target, delta, mechanism))
    assert 0.999 * target <= epsilon_of([made], delta) <= target
    # No part of the run costs more than all of it, so a ledger whose budget is the target lets the run finish.
    parts = [mechanism.steps - 1, *(1 << bits for bits in range(mechanism.steps.bit_length()))]
    assert all(epsilon_of([made.repeated(part)], delta) <= target for part in parts)


def test_figures_measured_elsewhere() -> None:
    """10,000 records, batch 100, 300 steps, δ = 1e-5: 1.0276, 0.7061 and 0.5138 for ε = 1, 3 and 8."""
    noises = [calibrate_noise(epsilon, 1e-5, SubsampledGaussian(0.01, 1.0, 300)) for epsilon in (1.0, 3.0, 8.0)]
    assert noises == pytest.approx([1.0276, 0.7061, 0.5138], rel=2e-3)


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


def test_a_target_just_above_the_cost_of_a_stride_of_the_search() -> None:
    """The search strides from 1 by factors of 1.6; what it aims at lies a little below the target."""
    mechanism = SubsampledGaussian(1.0, 1.6, 1)
    target = epsilon_of([mechanism], 1e-5) * 1.0003
    assert 1.6 < calibrate_noise(target, 1e-5, mechanism) < 1.602


def test_a_target_that_only_a_fine_grid_can_meet() -> None:
    """The search's own coarse grid overstates an ε this small, so it gives up; the stated ε does not."""
    mechanism = SubsampledGaussian(10 / 11, 1000.0, 12)
    target = 1.1 * epsilon_of([mechanism], 1e-5)
    noise = calibrate_noise(target, 1e-5, mechanism)
    assert noise <= 1000
    assert epsilon_of([replace(mechanism, noise_multiplier=noise)], 1e-5) <= target


@pytest.mark.parametrize(
    ("target", "delta", "mechanism"),
    [
        # The finest grid still falls steeply: what a search foretells ends at nothing.
        (1e-4, 1e-2, SubsampledGaussian(1e-3, 1.0, 10**6)),
        (0.002, 0.004, SubsampledGaussian(2.4e-4, 1.0, 291_465)),
        # Beyond what the central limit's own search covers.
        (1e-9, 1e-10, SubsampledGaussian(1e-9, 1.0, 1)),
        (1e6, 1e-5, SubsampledGaussian(0.5, 1.0, 3)),
        # Integer orders have a floor, and close to it ε hardly falls with the noise: below it, and just above.
        (
            0.010668249738405494,
            6.577746374778415e-09,
            SubsampledGaussian(0.0049162301955158185, 1.0, 20, discrete=True),
        ),
        (0.01069, 6.577746374778415e-09, SubsampledGaussian(0.0049162301955158185, 1.0, 20, discrete=True)),
        # Losses that are rare and huge.
        (0.00326, 3.1e-10, SubsampledGaussian(1.96e-6, 1.0, 5)),
        (0.00637, 1.95e-6, SubsampledGaussian(1.21e-5, 1.0, 80)),
    ],
)
def test_a_search_at_the_edge_ends(target: float, delta: float, mechanism: SubsampledGaussian) -> None:
    try:
        noise = calibrate_noise(target, delta, mechanism)
    except PrivacyError:
        return  # it says that no noise is enough
    assert epsilon_of([replace(mechanism, noise_multiplier=noise)], delta) <= target
