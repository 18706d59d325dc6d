"""Sums in float64, piece by piece: the bits of one addition, whatever the size, the layout and the order."""

from itertools import permutations

import pytest
import torch

from protocol.tensors import corner
from strategies.base import Contribution
from strategies.mean import WeightedMean, add_scaled


# Around a piece, 2^17 values; and none, one, and a matrix.
@pytest.mark.parametrize("shape", [(0,), (), (3, 5), (2**17 - 1,), (2**17,), (2**17 + 1,), (3, 2**17)])
def test_pieces_add_up_to_the_bits_of_one_addition(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    total = torch.randn(shape, generator=generator, dtype=torch.float64)
    tensor = torch.randn(shape, generator=generator)
    expected = total + 0.3 * tensor.double()
    add_scaled(total, tensor, 0.3)
    assert torch.allclose(total, expected, rtol=1e-15, atol=1e-15)
    at_once = torch.zeros(shape, dtype=torch.float64).add_(tensor, alpha=0.3)
    in_pieces = torch.zeros(shape, dtype=torch.float64)
    add_scaled(in_pieces, tensor, 0.3)
    assert torch.equal(in_pieces, at_once)


def test_a_corner_of_a_larger_sum_is_added_in_place_and_the_rest_left() -> None:
    total = torch.zeros(4, 6, dtype=torch.float64)
    add_scaled(corner(total, (2, 3)), torch.ones(2, 3), 2.0)
    assert total.sum() == 12
    assert torch.equal(total[:2, :3], torch.full((2, 3), 2.0, dtype=torch.float64))
    add_scaled(total, torch.ones(6, 4).T, 1.0)
    assert total.sum() == 36


def test_the_order_of_large_updates_does_not_show() -> None:
    generator = torch.Generator().manual_seed(1)
    updates = [
        Contribution({"x": torch.randn(2**17 + 7, generator=generator) * scale}, weight)
        for scale, weight in ((1e3, 1.0), (1.0, 37.0), (1e-3, 250.0))
    ]
    results: list[torch.Tensor] = []
    for order in permutations(updates):
        mean = WeightedMean()
        for each in order:
            mean.accumulate(each)
        results.append(mean.result()["x"])
    exact = sum(each.weight * each.update["x"].double() for each in updates) / sum(each.weight for each in updates)
    for result in results:
        # Half a unit in the last place of float32, and what float64 rounds.
        assert torch.allclose(result.double(), exact, rtol=2**-24 * 1.001, atol=1e-12)
    assert all(torch.equal(result, results[0]) for result in results)
