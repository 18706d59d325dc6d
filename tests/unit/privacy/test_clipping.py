"""The clipped sum, case by case and by its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from conf.schema.privacy import ExampleLevel
from privacy.clipping import clipped_sum

SHAPES = ((2, 3), (4,), (1,))


def flat(sums: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([each.flatten() for each in sums]).double()


def per_example(rows: list[list[float]]) -> list[torch.Tensor]:
    """Return rows of eleven numbers as the gradients of three parameters."""
    table, parts, start = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 11), [], 0
    for shape in SHAPES:
        size = math.prod(shape)
        parts.append(table[:, start : start + size].reshape(len(rows), *shape))
        start += size
    return parts


@pytest.mark.parametrize(
    ("gradient", "expected", "clipped", "non_finite"),
    [
        ([0.3, 0.4], [0.3, 0.4], 0, 0),
        ([0.0, -1.0], [0.0, -1.0], 0, 0),
        ([3.0, 4.0], [0.6, 0.8], 1, 0),
        ([0.0, 0.0], [0.0, 0.0], 0, 0),
        ([math.nan, 0.1], [0.0, 0.0], 0, 1),
        ([math.inf, 0.1], [0.0, 0.0], 0, 1),
        ([-math.inf, math.nan], [0.0, 0.0], 0, 1),
        ([3e18, 4e18], [0.6, 0.8], 1, 0),
        ([3e30, 4e30], [0.6, 0.8], 1, 0),
        ([3e-30, 4e-30], [3e-30, 4e-30], 0, 0),
    ],
)
def test_the_table(gradient: list[float], expected: list[float], clipped: int, non_finite: int) -> None:
    result = clipped_sum([torch.tensor([gradient])], 1.0)
    torch.testing.assert_close(result.sums[0], torch.tensor(expected).double(), rtol=1e-6, atol=0)
    assert (result.clipped, result.non_finite) == (clipped, non_finite)


def test_the_norm_spans_all_parameters() -> None:
    """3 in one tensor and 4 in another are one gradient of norm 5."""
    result = clipped_sum([torch.tensor([[3.0]]), torch.tensor([[[4.0]]])], 1.0)
    assert [each.item() for each in result.sums] == pytest.approx([0.6, 0.8])
    assert [tuple(each.shape) for each in result.sums] == [(1,), (1, 1)]


def test_a_poisoned_neighbor_changes_nothing() -> None:
    good = torch.tensor([[1.0, 2.0], [0.1, 0.2]])
    bad = torch.cat([good, torch.tensor([[math.nan, math.inf]])])
    assert torch.equal(clipped_sum([bad], 0.5).sums[0], clipped_sum([good], 0.5).sums[0])


def test_an_example_that_is_bad_in_one_tensor_is_out_of_all() -> None:
    result = clipped_sum([torch.tensor([[1.0]]), torch.tensor([[math.inf]])], 10.0)
    assert [each.item() for each in result.sums] == [0.0, 0.0]


@pytest.mark.parametrize("size", [4095, 4096, 4097, 3_000_000])
def test_a_long_gradient_is_clipped_as_exactly_as_a_short_one(size: int) -> None:
    """Three million equal squares summed one by one in float32 come out 0.1 % short, and too much gets through."""
    result = clipped_sum([torch.full((2, size), 0.1)], 1.0)
    assert float(result.sums[0].double().norm()) == pytest.approx(2.0, rel=1e-9)
    assert result.clipped == 2


def test_infinity_clips_nothing() -> None:
    rows = torch.tensor([[1e18, 2.0], [0.0, 0.0], [-3.0, 5.0]])
    result = clipped_sum([rows], math.inf)
    torch.testing.assert_close(result.sums[0], rows.double().sum(0))
    assert (result.clipped, result.non_finite) == (0, 0)


def test_sixteen_bit_gradients_are_summed_in_float64() -> None:
    """256 + 1 is 256 in bfloat16."""
    result = clipped_sum([torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)], 1e9)
    assert result.sums[0].dtype == torch.float64
    assert result.sums[0].item() == 257.0


numbers = st.one_of(
    st.floats(-1e3, 1e3, width=32), st.floats(width=32), st.sampled_from([0.0, 1e-38, 1e38, math.inf, math.nan])
)
row_lists = st.lists(st.lists(numbers, min_size=11, max_size=11), min_size=1, max_size=5)


@settings(deadline=None, max_examples=300)
@given(row_lists, st.floats(1e-3, 1e3))
def test_one_example_adds_at_most_the_clip_norm(rows: list[list[float]], clip_norm: float) -> None:
    whole = flat(clipped_sum(per_example(rows), clip_norm).sums)
    assert torch.isfinite(whole).all()
    rest = flat(clipped_sum(per_example(rows[1:]), clip_norm).sums)
    assert float((whole - rest).norm()) <= clip_norm * (1 + 1e-9)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=11, max_size=11),
    st.floats(0.1, 10),
    st.floats(1.5, 1e4),
)
def test_a_long_gradient_only_keeps_its_direction(row: list[float], clip_norm: float, factor: float) -> None:
    norm = float(torch.tensor(row, dtype=torch.float32).norm())
    if norm < 1e-3:
        return
    scale = 1.01 * clip_norm / norm
    near = flat(clipped_sum(per_example([[value * scale for value in row]]), clip_norm).sums)
    far = flat(clipped_sum(per_example([[value * scale * factor for value in row]]), clip_norm).sums)
    assert float(near.norm()) == pytest.approx(clip_norm, rel=1e-5)
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-6 * clip_norm)


def test_a_factor_that_float32_cannot_hold_adds_nothing() -> None:
    """C/norm as a subnormal would be rounded, possibly up, and let more than C through."""
    result = clipped_sum([torch.full((1, 4), 1e18)], 1e-25)
    assert float(result.sums[0].norm()) <= 1e-25


@pytest.mark.parametrize("clip_norm", [1e-6, 1e6])
def test_what_float32_loses_is_far_below_the_smallest_clip_norm(clip_norm: float) -> None:
    """Squares below 1e-45 vanish, so such a row passes unclipped: it must be nothing beside any clip norm allowed."""
    vanishing = torch.full((1, 10_000), 1e-23)
    assert float(clipped_sum([vanishing], clip_norm).sums[0].norm()) < 1e-12 * clip_norm


@pytest.mark.parametrize("clip_norm", [1e-37, 1e-7, 1e7])
def test_a_clip_norm_out_of_range_never_reaches_a_site(clip_norm: float) -> None:
    with pytest.raises(ValidationError, match="clip_norm"):
        ExampleLevel(noise_multiplier=1.0, clip_norm=clip_norm)
