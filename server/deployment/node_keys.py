"""A site's public node key: what Flower accepts, and how people compare it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from protocol.errors import ConfigError

__all__ = ["read_node_key"]

_HOW = "the site makes one with: ssh-keygen -t ecdsa -b 384 -N '' -f node"


def read_node_key(path: Path) -> str:
    """Return a public node key's fingerprint, as `ssh-keygen -lf` prints it.

    Raises:
        ConfigError: no public key of a NIST curve, or a private one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if b"PRIVATE KEY" in content:
        raise ConfigError(f"{path} is a private key, which must never leave its site; {_HOW}, and sends node.pub")
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no public key in OpenSSH's format: {error}; {_HOW}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path} is a {type(key).__name__}; Flower takes keys of a NIST curve only: {_HOW}")
    encoded = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
    digest = hashlib.sha256(base64.b64decode(encoded)).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"
