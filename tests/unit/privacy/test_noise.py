"""Gaussian noise on sums: its size, its lattice, and drawing it ahead."""

import math
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from scipy import stats

from privacy.discrete import DiscreteNoise
from privacy.noise import GaussianNoise, Noise, NoiseAhead
from privacy.randomness import SecureStream, _box_muller
from protocol.errors import PrivacyError

RARELY = 1e-6
"""Error rate of each statistical test here, were the seed free; the seeds are fixed, so a pass repeats."""


def test_it_adds_noise_of_multiplier_times_sensitivity() -> None:
    sums = (torch.full((300, 200), 7.0), torch.zeros(40_000))
    noise = GaussianNoise(multiplier=1.3, sensitivity=0.25)
    assert noise.standard_deviation == 0.325
    assert noise.clip_norm == 0.25
    noised = noise.add(sums, SecureStream.insecure(0))
    for before, after in zip(sums, noised, strict=True):
        assert (after.shape, after.dtype) == (before.shape, torch.float32)
        standardized = ((after - before) / 0.325).double().flatten().numpy()
        assert stats.kstest(standardized, "norm").pvalue > RARELY
        squares = stats.chi2(standardized.size)
        assert squares.ppf(RARELY / 2) < (standardized**2).sum() < squares.isf(RARELY / 2)
    assert torch.equal(sums[0], torch.full((300, 200), 7.0))


def test_tensors_and_steps_get_noise_of_their_own() -> None:
    stream, noise = SecureStream.insecure(0), GaussianNoise(1.0, 1.0)
    zeros = (torch.zeros(20_000), torch.zeros(20_000))
    drawn = torch.stack([*noise.add(zeros, stream), *noise.add(zeros, stream)])
    correlations = torch.corrcoef(drawn) - torch.eye(4)
    assert float(correlations.abs().max()) < 5 / 20_000**0.5


def test_it_uses_the_stream_and_nothing_else() -> None:
    noised = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        noised.append(GaussianNoise(1.0, 2.0).add((torch.zeros(9),), SecureStream.insecure(4))[0])
    assert torch.equal(*noised)
    expected = torch.from_numpy(SecureStream.insecure(4).gaussian(9) * 2.0)
    assert float((noised[0] - expected).abs().max()) <= GaussianNoise(1.0, 2.0).spacing / 2


@pytest.mark.parametrize("noise", [GaussianNoise(0.0, 5.0), GaussianNoise(1.0, 0.0)])
def test_without_multiplier_or_sensitivity_nothing_is_added(noise: GaussianNoise) -> None:
    sums, stream = (torch.tensor([1.0, -2.0e-9]),), SecureStream.insecure(0)
    (same,) = noise.add(sums, stream)
    assert torch.equal(same, sums[0])
    assert same.data_ptr() != sums[0].data_ptr()
    assert stream.uniform(1) == SecureStream.insecure(0).uniform(1)


@pytest.mark.parametrize("arguments", [(-1.0, 1.0), (1.0, -1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_impossible_noise_is_refused(arguments: tuple[float, float]) -> None:
    with pytest.raises(PrivacyError, match="is no noise: both must be finite and at least 0"):
        GaussianNoise(*arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_get_float32_noise(dtype: torch.dtype) -> None:
    """bfloat16 noise has 3,000 distinct values among 200,000; its low bits would tell the sum."""
    noise, parameter = GaussianNoise(1.0, 1.0), torch.zeros(200_000, dtype=dtype)
    total = noise.zeros(parameter)
    total += noise.fold(torch.ones(3, 200_000, dtype=dtype), torch.ones(3, dtype=dtype))
    (noised,) = noise.add((total,), SecureStream.insecure(0))
    assert (total.dtype, noised.dtype) == (torch.float64, torch.float32)
    assert len(noised.unique()) > 100_000
    # Also when somebody hands in the sum itself in half precision.
    assert len(noise.add((parameter,), SecureStream.insecure(0))[0].unique()) > 100_000


def test_folding_is_the_weighted_sum_of_rows() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    assert GaussianNoise(1.0, 1.0).fold(rows, torch.tensor([1.0, 0.5])).tolist() == [6.0, 12.0, 18.0]


# The lattice.


@pytest.mark.parametrize("deviation", [1.0, 0.2e-6, 1.999, 3e5])
def test_the_spacing_is_a_power_of_two_just_below_the_deviation(deviation: float) -> None:
    spacing = GaussianNoise(deviation, 1.0).spacing
    assert math.frexp(spacing)[0] == 0.5
    assert 2.0**-19 * deviation < spacing <= 2.0**-18 * deviation
    # Every lattice point within 32 deviations has 24 bits, so float32 keeps it.
    far = math.floor(32 * deviation / spacing) * spacing
    assert float(torch.tensor(far, dtype=torch.float64).float()) == far


def naive(value: float, count: int) -> np.ndarray:
    """Add noise as it is usually done: in float32, and without rounding."""
    drawn = SecureStream.insecure(6, repr(value)).gaussian(count).astype(np.float32)
    return (np.float32(value) + drawn).astype(np.float64)


def on_lattice(value: float, count: int) -> np.ndarray:
    sums = (torch.full((count,), value),)
    return GaussianNoise(1.0, 1.0).add(sums, SecureStream.insecure(6, repr(value)))[0].double().numpy()


def few_bits(released: np.ndarray) -> float:
    """Return how many of the released values near zero are multiples of 2^-26."""
    near = released[np.abs(released) < 2.0**-4]
    assert len(near) > 1000
    return float(np.mean(near * 2.0**26 % 1 == 0))


def test_without_the_lattice_low_bits_tell_two_sums_apart() -> None:
    """The attack of Mironov 2012. The sums 0 and 1 are neighbors: a value near 0 that comes from 1 + noise is a
    difference of two floats near 1, so its low bits are zero; one that comes from 0 + noise has them all.
    """
    count = 100_000
    assert few_bits(naive(1.0, count)) == 1.0
    assert few_bits(naive(0.0, count)) < 0.2
    assert few_bits(on_lattice(1.0, count)) == few_bits(on_lattice(0.0, count)) == 1.0


def test_on_the_lattice_low_bits_are_uniform_whatever_the_sum() -> None:
    for value in (0.0, 1.0, 1 / 3, -0.7310585):
        steps = on_lattice(value, 100_000) / GaussianNoise(1.0, 1.0).spacing
        assert np.array_equal(steps, steps.round())
        assert stats.chisquare(np.bincount(steps.astype(np.int64) % 64, minlength=64)).pvalue > RARELY


def words_for(pair: np.ndarray) -> np.ndarray:
    """Return the keystream words from which Box and Muller make (nearly) this pair: shape (2,)."""
    uniform = min(int(math.exp(-0.5 * float(pair @ pair)) * 2.0**75), (1 << 75) - 1)
    turn = int(math.atan2(pair[1], pair[0]) / (2 * math.pi) % 1.0 * 2.0**53)
    return np.array([uniform >> 11, (turn << 11) | (uniform & 2047)], dtype=np.uint64)


@pytest.mark.parametrize("deviation", [1.0, 1.999])
def test_every_lattice_point_within_nine_deviations_comes_from_every_sum(deviation: float) -> None:
    """The supports coincide: for each target there is a keystream that leads from each sum exactly there.

    Targets are pairs, because Box and Muller make pairs, up to the edge of what is claimed.
    """
    noise = GaussianNoise(deviation, 1.0)
    stream = SecureStream.insecure(7)
    radii = np.concatenate([stream.uniform(300) * 9, np.full(100, 8.99), stream.uniform(100) * 1e-5]) * deviation
    angles = stream.uniform(500) * 2 * np.pi
    for value in (0.0, 1.0, 1 / 3, -2.7182817):
        sums = torch.full((2,), value)
        center = sums.double().numpy()
        for radius, angle in zip(radii, angles, strict=True):
            ideal = center + radius * np.array([math.cos(angle), math.sin(angle)])
            target = np.round(ideal / noise.spacing) * noise.spacing
            drawn = np.empty(2)
            _box_muller(words_for((target - center) / deviation), drawn)
            (reached,) = noise.add_drawn((sums,), (torch.from_numpy(drawn),))
            assert reached.double().numpy().tolist() == target.tolist()


# Ahead of time.


@pytest.fixture
def aheads() -> Iterator[list[NoiseAhead]]:
    made: list[NoiseAhead] = []
    yield made
    for ahead in made:
        ahead.close()


LIKE = (torch.zeros(700, 50), torch.zeros(3), torch.zeros(()))


@pytest.mark.parametrize("noise", [GaussianNoise(0.7, 2.0), DiscreteNoise(0.7, 2.0, 35_004), GaussianNoise(0.0, 1.0)])
@pytest.mark.parametrize("steps", [1, 3, 9])
def test_drawing_ahead_changes_no_bit(noise: Noise, steps: int, aheads: list[NoiseAhead]) -> None:
    aheads.append(NoiseAhead(noise, LIKE, SecureStream.insecure(8), steps))
    foreground = SecureStream.insecure(8).child("noise")
    for step in range(3):
        sums = tuple(noise.zeros(one) + step for one in LIKE)
        for early, late in zip(aheads[0].add(sums), noise.add(sums, foreground), strict=True):
            assert early.dtype == torch.float32
            assert torch.equal(early, late)


def test_the_caller_goes_on_with_its_stream_undisturbed(aheads: list[NoiseAhead]) -> None:
    stream = SecureStream.insecure(8)
    aheads.append(NoiseAhead(GaussianNoise(1.0, 1.0), LIKE, stream, 2))
    aheads[0].add(LIKE)
    assert stream.uniform(3).tolist() == SecureStream.insecure(8).uniform(3).tolist()


def test_two_of_them_on_one_stream_would_share_their_noise(aheads: list[NoiseAhead]) -> None:
    stream = SecureStream.insecure(8)
    aheads.append(NoiseAhead(GaussianNoise(1.0, 1.0), LIKE, stream, 2))
    with pytest.raises(ValueError, match="already has a child 'noise'"):
        NoiseAhead(GaussianNoise(1.0, 1.0), LIKE, stream, 2)


def test_what_goes_wrong_in_the_thread_is_seen(aheads: list[NoiseAhead]) -> None:
    too_large = (torch.empty(1 << 59, device="meta"),)
    aheads.append(NoiseAhead(GaussianNoise(1.0, 1.0), too_large, SecureStream.insecure(0), 2))
    for _ in range(2):
        with pytest.raises((MemoryError, ValueError)):
            aheads[0].add((torch.zeros(1),))


def test_noise_is_never_used_twice_even_after_a_failure(aheads: list[NoiseAhead]) -> None:
    noise, sums = GaussianNoise(1.0, 1.0), (torch.zeros(5), torch.zeros(5))
    aheads.append(NoiseAhead(noise, sums, SecureStream.insecure(9), 2))
    foreground = SecureStream.insecure(9).child("noise")
    with pytest.raises(ValueError, match="longer than argument 1"):
        aheads[0].add(sums[:1])
    noise.add(sums, foreground)
    assert torch.equal(aheads[0].add(sums)[0], noise.add(sums, foreground)[0])


def test_nothing_is_drawn_beyond_the_last_step(aheads: list[NoiseAhead]) -> None:
    noise, drawn = GaussianNoise(1.0, 1.0), []

    class Counted(GaussianNoise):
        def draw(self, like: Sequence[torch.Tensor], stream: SecureStream) -> tuple[torch.Tensor, ...]:
            drawn.append(len(like))
            return noise.draw(like, stream)

    aheads.append(NoiseAhead(Counted(1.0, 1.0), LIKE, SecureStream.insecure(0), 2))
    for _ in range(2):
        aheads[0].add(LIKE)
    aheads[0].close()
    assert len(drawn) == 2


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    ahead = NoiseAhead(GaussianNoise(1.0, 1.0), LIKE, SecureStream.insecure(0), 2)
    assert threading.active_count() == before + 1
    ahead.close()
    ahead.close()
    assert threading.active_count() == before
