"""Random numbers for privacy: a ChaCha20 keystream, keyed by the operating system or by a secret.

Sampling and noise must be unpredictable: whoever can repeat them can subtract them. torch's and numpy's global
generators are seeded for repeatability all over a training program, so nothing here uses them.
"""

from __future__ import annotations

import hashlib
import re
import secrets

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = ["SecureStream", "inputs_digest", "round_stream"]

_KEY_BYTES = 32
_NONCE_BYTES = 16
_LENGTH_BYTES = 8
_SHA256_HEX = re.compile(r"[0-9a-f]{64}")
# Pairs per block, which then stays in the cache.
_BLOCK = 1 << 13
# Values per call of torch's sine and cosine, which start a team of threads from some 1600 on.
_UNTHREADED = 1 << 10
_LOW_BITS = 11


class SecureStream:
    """An endless stream of unpredictable numbers. Not shared between threads: give each a `child`."""

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a stream key has {_KEY_BYTES} bytes, not {len(key)}")
        self._key = key
        self._labels: set[str] = set()
        # The key is used for this one keystream, so a constant nonce repeats nothing.
        self._keystream = Cipher(algorithms.ChaCha20(key, bytes(_NONCE_BYTES)), mode=None).encryptor()

    def __repr__(self) -> str:
        return "SecureStream(key hidden)"

    @classmethod
    def from_operating_system(cls) -> SecureStream:
        """Return a stream that nobody can repeat."""
        return cls(secrets.token_bytes(_KEY_BYTES))

    @classmethod
    def derived(cls, secret: bytes, *context: str | int) -> SecureStream:
        """Return the stream of a secret and a context (HKDF-SHA256, RFC 5869).

        The same secret and context give the same stream. Different contexts give independent ones, and nobody who
        lacks the secret can tell them from noise.

        Args:
            secret: at least 32 random bytes, as `secrets.token_bytes(32)` makes them; not a password.
            context: what the stream is for. Types and lengths are part of it: ("a", "bc") is not ("ab", "c"), and "1"
                is not 1.

        Raises:
            ValueError: the secret is too short.
        """
        if len(secret) < _KEY_BYTES:
            raise ValueError(
                f"the secret of a stream has {len(secret)} bytes, it needs {_KEY_BYTES} or more: "
                f"make one with secrets.token_bytes({_KEY_BYTES})"
            )
        return cls(_derive(secret, "derived", *context))

    @classmethod
    def insecure(cls, seed: int, *context: str | int) -> SecureStream:
        """Return the stream of `seed` and `context`: repeatable by everybody, so only for simulation.

        Different contexts (site, round) give independent streams, so two sites never add the same noise.
        """
        return cls(_derive(str(seed).encode(), "insecure", *context))

    def child(self, label: str) -> SecureStream:
        """Return a stream of its own, derived from this stream's key and `label`.

        It does not depend on what was drawn from this stream, and drawing from it leaves this one where it is.

        Raises:
            ValueError: the label was taken before; two streams of one label are the same numbers, and the same noise
                on two sums cancels in their difference.
        """
        if label in self._labels:
            raise ValueError(
                f"this stream already has a child {label!r}, whose numbers would repeat: use another label"
            )
        self._labels.add(label)
        # ChaCha20 and HMAC-SHA256 have nothing in common, so one key may serve both.
        return SecureStream(_derive(self._key, "child", label))

    def words(self, count: int) -> np.ndarray:
        """Return `count` uniform 64-bit words, dtype uint64. Read-only."""
        return np.frombuffer(self._keystream.update(bytes(8 * count)), dtype="<u8")

    def uniform(self, count: int) -> np.ndarray:
        """Return `count` float64 values, uniform on the multiples of 2^-53 in [0, 1)."""
        return (self.words(count) >> np.uint64(_LOW_BITS)).astype(np.float64) * 2.0**-53

    def gaussian(self, count: int) -> np.ndarray:
        """Return `count` standard normal float64 values (Box and Muller 1958), up to 10.26 in size.

        Bit by bit the same for the same stream, `count`, software and kind of processor.
        """
        pairs = (count + 1) // 2
        values = np.empty(2 * pairs)
        for start in range(0, pairs, _BLOCK):
            stop = min(start + _BLOCK, pairs)
            _box_muller(self.words(2 * (stop - start)), values[2 * start : 2 * stop])
        return values[:count]


def _box_muller(words: np.ndarray, values: np.ndarray) -> None:
    """Write one standard normal value per word to `values`; the number of words is even.

    The first half of the words, with the low 11 bits of the second half, are the uniform number of 75 bits that the
    radius comes from. 53 bits would leave the tail coarse: radii beyond 7.2 would be farther apart than the lattice
    that noise is rounded to (docs/decisions/0005-noise.md), now those beyond 9 are. The other 53 bits are the angle.
    """
    import torch  # here, so that `cloister plan`, which draws nothing, need not wait for it

    half = len(words) // 2
    tall, rest = words[:half], words[half:]
    low = (rest & np.uint64((1 << _LOW_BITS) - 1)).astype(np.float64)
    # Never zero, so the logarithm is finite; rounded to 1 at the other end, where the radius is 0.
    uniform = tall.astype(np.float64) * 2.0**-64 + (low + 0.5) * 2.0**-75
    radius = np.sqrt(-2.0 * np.log(uniform))
    angle = (rest >> np.uint64(_LOW_BITS)).astype(np.float64) * (2.0 * np.pi * 2.0**-53)
    # Three times as fast as numpy's; a team of threads would take the training's cores.
    angles, cosines, sines = (
        torch.from_numpy(part).split(_UNTHREADED) for part in (angle, values[:half], values[half:])
    )
    for one, cosine, sine in zip(angles, cosines, sines, strict=True):
        torch.cos(one, out=cosine)
        torch.sin(one, out=sine)
    values[:half] *= radius
    values[half:] *= radius


def round_stream(secret: bytes, *, run: str, round_number: int, inputs_digest: str, attempt: int) -> SecureStream:
    """Return the randomness of one attempt at one round at one site.

    The same arguments give the same bits, so repeating a round after a crash releases nothing new and costs nothing.
    Anything else in any argument gives independent numbers: such a round is a new release, to be charged, and can never
    put the noise of another one on other inputs, where it would cancel in the difference.

    Args:
        secret: the site's own, at least 32 random bytes; whoever has it can subtract the noise.
        run: the run's name.
        round_number: counted from 1.
        inputs_digest: what `inputs_digest` returns for everything that the round's result depends on.
        attempt: raised for a new, charged attempt on the same inputs; kept for a replay.

    Raises:
        ValueError: the secret is too short, or `inputs_digest` is no SHA-256 in hexadecimal.
    """
    if not _SHA256_HEX.fullmatch(inputs_digest):
        raise ValueError(
            f"inputs_digest={inputs_digest!r} is not 64 hexadecimal digits: noise must be bound to its inputs, "
            "use inputs_digest(...)"
        )
    return SecureStream.derived(secret, "round", run, round_number, inputs_digest, attempt)


def inputs_digest(*parts: str) -> str:
    """Return the SHA-256 (hex) of the parts and their lengths.

    For `round_stream` the parts are everything that decides what is released: the digest of the global weights, the
    fingerprint of the records and the digest of the plan.
    """
    return hashlib.sha256(_encode(*parts)).hexdigest()


def _derive(secret: bytes, purpose: str, *context: str | int) -> bytes:
    info = _encode("cloister", purpose, *context)
    return HKDF(algorithm=hashes.SHA256(), length=_KEY_BYTES, salt=None, info=info).derive(secret)


def _encode(*parts: str | int) -> bytes:
    """Return the parts, each behind its type and its length: two different lists never give the same bytes."""
    return b"".join(_encode_one(part) for part in parts)


def _encode_one(part: str | int) -> bytes:
    kind = b"s" if isinstance(part, str) else b"i"
    text = str(part).encode()
    return kind + len(text).to_bytes(_LENGTH_BYTES, "big") + text
