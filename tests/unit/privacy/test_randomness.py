"""The random numbers of sampling and noise."""

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from privacy.randomness import SecureStream

RARELY = 1e-6
"""Error rate of each statistical test here, were the seed free; the seeds are fixed, so a pass repeats."""


def test_uniform_values_are_uniform() -> None:
    values = SecureStream.insecure(0, "uniform").uniform(200_000)
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > RARELY
    # The low bits too: 53 of them are random, so thousandths of the last visible digits are uniform again.
    assert stats.kstest((values * 2**40) % 1, "uniform").pvalue > RARELY


@pytest.mark.parametrize("count", [200_000, 199_999])
def test_gaussian_values_are_standard_normal(count: int) -> None:
    values = SecureStream.insecure(0, "gaussian").gaussian(count)
    assert values.shape == (count,)
    assert np.isfinite(values).all()
    assert stats.kstest(values, "norm").pvalue > RARELY
    assert abs(values.mean()) < 5 / count**0.5
    assert values.var() == pytest.approx(1, abs=5 * (2 / count) ** 0.5)
    assert stats.kurtosis(values) == pytest.approx(0, abs=5 * (24 / count) ** 0.5)
    # Box and Muller make pairs; halves that are each normal could still depend on each other.
    half = count // 2
    left, right = values[:half], values[count - half :]
    assert abs(np.corrcoef(left, right)[0, 1]) < 5 / half**0.5
    assert abs(np.corrcoef(left**2, right**2)[0, 1]) < 5 / half**0.5
    # Beyond four standard deviations lie 63 per million.
    expected = count * 2 * stats.norm.sf(4)
    assert abs((np.abs(values) > 4).sum() - expected) < 5 * expected**0.5


def test_it_is_the_chacha20_keystream() -> None:
    key = bytes(range(32))
    keystream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(24))
    words = np.frombuffer(keystream, dtype="<u8")
    assert SecureStream(key).uniform(3).tolist() == [int(word >> np.uint64(11)) / 2**53 for word in words]


def test_a_seed_and_context_repeat() -> None:
    first, second = (SecureStream.insecure(3, "harbor", 2).uniform(5) for _ in range(2))
    assert first.tolist() == second.tolist()


def test_a_stream_goes_on_instead_of_starting_over() -> None:
    stream = SecureStream.insecure(3)
    pieces = np.concatenate([stream.uniform(4), stream.uniform(0), stream.uniform(3)])
    assert pieces.tolist() == SecureStream.insecure(3).uniform(7).tolist()
    assert len(set(pieces.tolist())) == 7


def test_contexts_are_independent() -> None:
    contexts = [(0, "harbor", 1), (0, "harbor", 2), (0, "northgate", 1), (1, "harbor", 1), (0, "harbor"), (0,)]
    streams = [SecureStream.insecure(*context).gaussian(50_000) for context in contexts]
    correlations = np.corrcoef(np.stack(streams)) - np.eye(len(streams))
    assert np.abs(correlations).max() < 5 / 50_000**0.5


def test_contexts_cannot_run_into_each_other() -> None:
    assert SecureStream.insecure(0, "a", 12).uniform(1) != SecureStream.insecure(0, "a1", 2).uniform(1)
    assert SecureStream.insecure(1, 2).uniform(1) != SecureStream.insecure(12).uniform(1)


def test_the_operating_system_never_repeats_and_ignores_seeds() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(SecureStream.from_operating_system().uniform(4))
    assert not set(drawn[0]) & set(drawn[1])


def test_no_global_generator_is_used_or_moved() -> None:
    torch.manual_seed(0)
    expected = SecureStream.insecure(5).gaussian(3).tolist()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    torch.manual_seed(1)
    assert SecureStream.insecure(5).gaussian(3).tolist() == expected
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="a stream key has 32 bytes, not 16"):
        SecureStream(bytes(16))
