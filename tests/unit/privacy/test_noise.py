"""Gaussian noise on sums."""

import pytest
import torch
from scipy import stats

from privacy.noise import GaussianNoise
from privacy.randomness import SecureStream


def test_it_adds_noise_of_multiplier_times_sensitivity() -> None:
    sums = (torch.full((300, 200), 7.0), torch.zeros(40_000))
    noise = GaussianNoise(multiplier=1.3, sensitivity=0.25)
    assert noise.standard_deviation == 0.325
    noised = noise.add(sums, SecureStream.insecure(0))
    for before, after in zip(sums, noised, strict=True):
        assert (after.shape, after.dtype) == (before.shape, torch.float32)
        standardized = ((after - before) / 0.325).double().flatten().numpy()
        assert stats.kstest(standardized, "norm").pvalue > 1e-6
        assert standardized.std() == pytest.approx(1, rel=5 / (2 * standardized.size) ** 0.5)
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
    expected = torch.from_numpy(SecureStream.insecure(4).gaussian(9) * 2.0).float()
    assert torch.equal(noised[0], expected)


def test_no_multiplier_adds_nothing() -> None:
    sums = (torch.tensor([1.0, -2.0]),)
    assert torch.equal(GaussianNoise(0.0, 5.0).add(sums, SecureStream.insecure(0))[0], sums[0])
