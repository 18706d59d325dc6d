"""The random numbers of sampling and noise."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from privacy.randomness import SecureStream, _box_muller, inputs_digest, round_stream

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


SECRET = bytes(range(32))


def first_words(stream: SecureStream) -> tuple[int, ...]:
    return tuple(stream.words(4).tolist())


AMBIGUOUS: list[tuple[str | int, ...]] = [
    ("a", 12),
    ("a1", 2),
    ("a12",),
    ("a", "12"),
    ("a", 1, 2),
    ("a\x00i12",),
    ("a", "", 12),
    ("", "a", 12),
    (),
    ("",),
]


def test_contexts_cannot_run_into_each_other() -> None:
    for make in (lambda *c: SecureStream.insecure(0, *c), lambda *c: SecureStream.derived(SECRET, *c)):
        assert len({first_words(make(*context)) for context in AMBIGUOUS}) == len(AMBIGUOUS)
    texts = [parts for parts in AMBIGUOUS if all(isinstance(part, str) for part in parts)]
    assert len({inputs_digest(*parts) for parts in texts}) == len(texts)


def test_seeds_secrets_and_children_are_worlds_apart() -> None:
    """One key and one label, by every way there is: never the same numbers."""
    ways = [
        SecureStream(SECRET),
        SecureStream(SECRET).child("noise"),
        SecureStream.derived(SECRET, "noise"),
        SecureStream.derived(SECRET),
        SecureStream.insecure(0, "noise"),
        SecureStream.derived(SECRET + b"x", "noise"),
    ]
    assert len({first_words(way) for way in ways}) == len(ways)


@pytest.mark.parametrize("secret", [b"", bytes(31)])
def test_a_short_secret_is_refused(secret: bytes) -> None:
    with pytest.raises(ValueError, match=rf"the secret of a stream has {len(secret)} bytes, it needs 32 or more: make"):
        SecureStream.derived(secret, "noise")


def test_a_child_depends_on_key_and_label_alone_and_moves_nothing() -> None:
    parent, other = SecureStream(SECRET), SecureStream(SECRET)
    parent.uniform(1000)
    child = parent.child("noise")
    assert first_words(child) == first_words(other.child("noise"))
    child.gaussian(1000)
    other.uniform(1000)
    assert first_words(parent) == first_words(other)
    assert first_words(parent.child("sampling")) != first_words(SecureStream(SECRET).child("noise"))
    grandchildren = [SecureStream(SECRET).child(a).child(b) for a, b in (("x", "y"), ("y", "x"), ("xy", ""))]
    assert len({first_words(stream) for stream in grandchildren}) == 3


def test_a_label_is_taken_once() -> None:
    """A second stream of one label would put the same noise on another sum."""
    stream = SecureStream.insecure(0)
    stream.child("noise")
    with pytest.raises(ValueError, match="this stream already has a child 'noise', whose numbers would repeat: use an"):
        stream.child("noise")


ROUND: dict[str, Any] = {
    "secret": SECRET,
    "run": "run",
    "round_number": 1,
    "inputs_digest": inputs_digest("weights", "records", "plan"),
    "attempt": 0,
}


def test_a_replay_is_bit_identical() -> None:
    once, again = (round_stream(**ROUND).gaussian(70_001) for _ in range(2))
    assert once.tobytes() == again.tobytes()


@pytest.mark.parametrize(
    "changed",
    [
        {"secret": bytes(32)},
        {"run": "run1", "round_number": 1},
        {"round_number": 2},
        {"attempt": 1},
        {"round_number": 0, "attempt": 1},
        {"inputs_digest": inputs_digest("other weights", "records", "plan")},
        {"inputs_digest": inputs_digest("weights", "other records", "plan")},
        {"inputs_digest": inputs_digest("weights", "records", "other plan")},
        {"inputs_digest": inputs_digest("weightsrecords", "", "plan")},
        {"inputs_digest": inputs_digest("records", "weights", "plan")},
    ],
)
def test_any_change_of_any_input_changes_the_noise(changed: dict[str, Any]) -> None:
    """The same noise on other inputs would cancel in the difference of the two results."""
    count = 50_000
    once, other = (round_stream(**{**ROUND, **more}).gaussian(count) for more in ({}, changed))
    assert abs(np.corrcoef(once, other)[0, 1]) < 5 / count**0.5


@pytest.mark.parametrize("digest", ["", "weights", "A" * 64, "a" * 64 + "\n"])
def test_noise_is_bound_to_a_digest(digest: str) -> None:
    with pytest.raises(
        ValueError, match="is not 64 hexadecimal digits: noise must be bound to its inputs, use inputs_"
    ):
        round_stream(**{**ROUND, "inputs_digest": digest})


def test_no_key_is_shown_or_stored() -> None:
    stream = SecureStream(b"0123456789abcdef" * 2)
    assert repr(stream) == str(stream) == "SecureStream(key hidden)"
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(stream)


def test_the_largest_value_and_the_smallest_come_from_the_extreme_words() -> None:
    """Radii: sqrt(2 · 76 · ln 2) for all bits zero, 0 for all bits one; never infinite or NaN."""
    highest = (1 << 64) - 1
    values = np.empty(4)
    _box_muller(np.array([0, highest, 0, highest], dtype=np.uint64), values)
    assert values[0] == pytest.approx((2 * 76 * np.log(2)) ** 0.5, rel=1e-15)
    assert abs(values[1]) < 2e-8
    assert np.isfinite(values).all()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_noise_is_drawn_by_one_thread() -> None:
    """A team of threads would take the training's cores, and spin."""
    code = (
        "import os, threading\n"
        "from privacy.randomness import SecureStream\n"
        "stream, counts = SecureStream.from_operating_system(), []\n"
        "def draw():\n"
        "    before = len(os.listdir('/proc/self/task'))\n"
        "    stream.gaussian(200_000)\n"
        "    counts.append(len(os.listdir('/proc/self/task')) - before)\n"
        "thread = threading.Thread(target=draw)\n"
        "thread.start()\n"
        "thread.join()\n"
        "print(*counts)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0"]


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
