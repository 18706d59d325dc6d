"""Per-example values to per-unit ones, and the loss that is released with noise."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from privacy.clipping import clipped_sum, sum_by_unit
from privacy.gradients import gradient_rule
from privacy.plan import LossRelease, PrivacyPlan
from privacy.randomness import SecureStream
from privacy.sampling import PoissonSampling

PLAN = PrivacyPlan("record", "add or remove one record", PoissonSampling(0.5, 100), 1.0, 1.0, 4.0, 1, 1, 1e-5)


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ([0, 1, 2], [[1.0], [2.0], [4.0]]),
        ([0, 1, -1], [[1.0], [2.0]]),
        ([0, 0, 1], [[3.0], [4.0]]),
        ([1, -1, 0], [[4.0], [1.0]]),
        ([0, -1, 0], [[5.0]]),
        ([-1, -1, -1], []),
    ],
)
def test_sums_by_unit(owners: list[int], expected: list[list[float]]) -> None:
    (sums,) = sum_by_unit([torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.bfloat16)], torch.tensor(owners))
    assert sums.dtype == torch.float32
    assert sums.tolist() == expected


def test_a_padding_row_may_hold_anything() -> None:
    rows = torch.tensor([[1.0], [math.nan], [2.0]])
    assert sum_by_unit([rows], torch.tensor([0, -1, 0]))[0].tolist() == [[3.0]]
    assert sum_by_unit([rows], torch.tensor([0, -1, 1]))[0].tolist() == [[1.0], [2.0]]


def test_padding_alone_sums_to_nothing() -> None:
    (rows,) = sum_by_unit([torch.ones(2, 3)], torch.tensor([-1, -1]))
    assert torch.equal(clipped_sum([rows], 1.0).sums[0], torch.zeros(3))


def released(losses: list[list[float]], release: LossRelease, seed: int = 0, **plan: float) -> float | None:
    """Return what a round with these steps of unit losses releases."""
    network = nn.Linear(1, 1, bias=False)
    trained = dict(network.named_parameters())
    rule = gradient_rule(replace(PLAN, loss=release, **plan), "native", network, trained, SecureStream.insecure(seed))
    for step in losses:
        # Two micro-batches, the second with a padding row.
        for part in (step[:2], step[2:]):
            if part:
                values = network(torch.zeros(len(part) + 1, 1))[:, 0] + torch.tensor([*part, 1e9])
                rule.accumulate(values, torch.tensor([*range(len(part)), -1]))
        rule.finish()
    rule.close()
    return rule.released_loss


def test_the_released_loss_is_bounded_summed_and_divided_by_the_public_number() -> None:
    steps = [[1.0, 2.0, 30.0], [], [math.nan, math.inf, -5.0, 0.5]]
    expected = ((1.0 + 2.0 + 10.0) + 0.0 + 0.5) / 4.0 / 3
    # No noise: the multiplier is the smallest float that is not zero to the accountant.
    assert released(steps, LossRelease(1e-12, 10.0)) == pytest.approx(expected, rel=1e-6)


def test_one_unit_moves_the_sum_by_at_most_the_bound() -> None:
    release = LossRelease(1e-12, 10.0)
    without = released([[1.0, 2.0]], release)
    assert without is not None
    for extreme in (1e30, -1e30, math.nan, math.inf, 3.0):
        moved = released([[1.0, 2.0, extreme]], release)
        assert moved is not None
        assert abs(moved - without) <= 10.0 / PLAN.normalizer * (1 + 1e-6)


def test_the_noise_is_fresh_in_every_step_and_of_the_accounted_size() -> None:
    values = torch.tensor([released([[0.0]] * 4, LossRelease(3.0, 10.0), seed) for seed in range(400)])
    expected = 3.0 * 10.0 / PLAN.normalizer / 4**0.5
    # A sample's standard deviation is known to 1/sqrt(2n); five of them fail once in a million runs.
    assert float(values.std()) == pytest.approx(expected, rel=5 / 800**0.5)
    assert abs(float(values.mean())) < 5 * expected / 400**0.5


def test_nothing_is_released_unless_planned() -> None:
    network = nn.Linear(1, 1)
    rule = gradient_rule(PLAN, "one_by_one", network, dict(network.named_parameters()), SecureStream.insecure(0))
    rule.finish()
    assert rule.released_loss is None
    unfinished = replace(PLAN, loss=LossRelease(1.0, 1.0))
    rule = gradient_rule(unfinished, "one_by_one", network, dict(network.named_parameters()), SecureStream.insecure(0))
    assert rule.released_loss is None
