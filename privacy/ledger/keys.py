"""A site's two secrets: the Ed25519 key that signs its ledger, and the key of its data identities and its noise."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from protocol.errors import PrivacyError

__all__ = [
    "HEAD_FILE",
    "PUBLIC_KEY_FILE",
    "SECRET_FILE",
    "SIGNING_KEY_FILE",
    "SITE_LEDGER_FILE",
    "SigningKey",
    "SiteKeys",
    "VerifyingKey",
    "head_file",
    "load_or_create_keys",
    "load_verifying_key",
    "open_private",
]

SIGNING_KEY_FILE, PUBLIC_KEY_FILE, SECRET_FILE = "ledger.key", "ledger.pub", "site.secret"
HEAD_FILE = "ledger.head"
"""The hash of the ledger's last entry, kept beside the keys: see `Journal`."""
SITE_LEDGER_FILE = "site_ledger.db"
"""The ledger in which a whole site is one unit."""
_SECRET_BYTES = 32


def head_file(keys: Path, ledger: str | Path) -> Path:
    """Return where the head of a ledger is noted; the two ledgers of a site share a folder of keys."""
    return keys / (f"site_{HEAD_FILE}" if str(ledger).endswith(SITE_LEDGER_FILE) else HEAD_FILE)


class VerifyingKey:
    """The public half: what an auditor needs."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self.key_id = hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]

    @classmethod
    def from_hex(cls, key: str) -> VerifyingKey:
        """Return the key of 32 bytes in hex."""
        return cls(Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)))

    def to_hex(self) -> str:
        """Return the key's 32 bytes in hex."""
        return self._key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def accepts(self, signature: bytes, message: bytes) -> bool:
        """Return whether `signature` is this key's on `message`."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def to_pem(self) -> bytes:
        """Return the key in PEM, as other tools read it."""
        return self._key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class SigningKey:
    """The private half. It signs; it is never printed, sent or put into an entry."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.verifying = VerifyingKey(key.public_key())

    @classmethod
    def generate(cls) -> SigningKey:
        """Return a new key, from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @property
    def key_id(self) -> str:
        """16 hex digits of the SHA-256 of the public key."""
        return self.verifying.key_id

    def sign(self, message: bytes) -> bytes:
        """Return the Ed25519 signature (64 bytes) of `message`."""
        return self._key.sign(message)

    def to_pem(self) -> bytes:
        """Return the private key in PEM (PKCS 8, not encrypted: the file's permissions protect it)."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class SiteKeys(NamedTuple):
    """What a site must keep to itself, and must not lose."""

    signing: SigningKey
    secret: bytes


def load_or_create_keys(directory: Path) -> SiteKeys:
    """Return the keys kept in `directory`, created at the first call: `ledger.key`, `ledger.pub` and `site.secret`.

    Raises:
        PrivacyError: a secret file that others may read, that is damaged, or that is gone while its sibling is there.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PrivacyError(f"the folder {directory} for the site's keys cannot be made: {error.strerror}") from error
    key_path, secret_path = directory / SIGNING_KEY_FILE, directory / SECRET_FILE
    if key_path.exists() and not secret_path.exists():
        raise PrivacyError(
            f"{secret_path} is missing beside {key_path}: restore it from a backup. A new secret would not recognize "
            "the records that the ledger has already charged"
        )
    # The secret first: a crash in between leaves a state that the next call completes.
    _create(secret_path, secrets.token_bytes(_SECRET_BYTES))
    _create(key_path, SigningKey.generate().to_pem())
    signing = _signing_key(key_path)
    _create(directory / PUBLIC_KEY_FILE, signing.verifying.to_pem())
    secret = _read_private(secret_path)
    if len(secret) != _SECRET_BYTES:
        raise PrivacyError(f"{secret_path} has {len(secret)} bytes instead of {_SECRET_BYTES}; restore it")
    return SiteKeys(signing, secret)


def open_private(path: Path, mode: Literal["a", "w"]) -> TextIO:
    """Open a text file for writing; one that is made gets mode 0600, whatever the umask is."""
    return open(path, mode, encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600))


def load_verifying_key(path: Path) -> VerifyingKey:
    """Return the public key in a PEM file.

    Raises:
        PrivacyError: no such file, or no Ed25519 public key in it.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PrivacyError(
            f"the public key {path} cannot be read: {error}; ask the site for its {PUBLIC_KEY_FILE}, and name it with "
            "--public-key"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise PrivacyError(f"the public key {path} is not an Ed25519 key; ask the site for its {PUBLIC_KEY_FILE}")
    return VerifyingKey(key)


def _signing_key(path: Path) -> SigningKey:
    try:
        key = load_pem_private_key(_read_private(path), password=None)
    except (ValueError, TypeError) as error:
        raise PrivacyError(f"{path} holds no readable private key ({error}); restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise PrivacyError(f"{path} is not an Ed25519 key; restore it from a backup")
    return SigningKey(key)


def _read_private(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise PrivacyError(f"{path} has mode {mode:04o}, others can read or write it; run: chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        raise PrivacyError(f"{path} cannot be read: {error.strerror}; restore it from a backup") from error


def _create(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 that appears whole, unless it is there; of two processes one wins, both read its."""
    if path.exists():
        return
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    except OSError as error:
        raise PrivacyError(f"{path} cannot be made: {error.strerror}; use a folder that can be written") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        Path(temporary).unlink()
