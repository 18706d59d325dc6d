"""Random numbers for privacy: a ChaCha20 keystream, keyed by the operating system.

Sampling and noise must be unpredictable: whoever can repeat them can subtract them. torch's and numpy's global
generators are seeded for repeatability all over a training program, so nothing here uses them.
"""

from __future__ import annotations

import secrets

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = ["SecureStream"]

_KEY_BYTES = 32
_NONCE_BYTES = 16


class SecureStream:
    """An endless stream of unpredictable numbers. Not shared between threads."""

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a stream key has {_KEY_BYTES} bytes, not {len(key)}")
        # The key is used for this one stream, so a constant nonce repeats nothing.
        self._keystream = Cipher(algorithms.ChaCha20(key, bytes(_NONCE_BYTES)), mode=None).encryptor()

    @classmethod
    def from_operating_system(cls) -> SecureStream:
        """Return a stream that nobody can repeat."""
        return cls(secrets.token_bytes(_KEY_BYTES))

    @classmethod
    def insecure(cls, seed: int, *context: str | int) -> SecureStream:
        """Return the stream of `seed` and `context` (HKDF-SHA256): repeatable, so only for simulation.

        Different contexts (site, round) give independent streams, so two sites never add the same noise.
        """
        info = b"\x00".join(str(part).encode() for part in ("cloister", *context))
        derive = HKDF(algorithm=hashes.SHA256(), length=_KEY_BYTES, salt=None, info=info)
        return cls(derive.derive(str(seed).encode()))

    def uniform(self, count: int) -> np.ndarray:
        """Return `count` float64 values, uniform on the multiples of 2^-53 in [0, 1)."""
        return (self._words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussian(self, count: int) -> np.ndarray:
        """Return `count` standard normal float64 values (Box and Muller 1958)."""
        pairs = (count + 1) // 2
        # 1 - u lies in (0, 1], so the logarithm is finite; the largest value is sqrt(2 * 53 * ln 2) = 8.57.
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(pairs)))
        angle = 2.0 * np.pi * self.uniform(pairs)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def _words(self, count: int) -> np.ndarray:
        return np.frombuffer(self._keystream.update(bytes(8 * count)), dtype="<u8")
