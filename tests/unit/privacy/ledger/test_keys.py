"""Secrets in files: nobody else can read them, and losing one is noticed."""

import multiprocessing
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from privacy.ledger import SigningKey, load_or_create_keys
from privacy.ledger.keys import load_verifying_key
from protocol.errors import PrivacyError


def test_keys_are_made_once_and_are_nobody_elses(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        made = load_or_create_keys(tmp_path / "state")
    finally:
        os.umask(previous)
    again = load_or_create_keys(tmp_path / "state")
    assert again.secret == made.secret
    assert len(made.secret) == 32
    assert again.signing.key_id == made.signing.key_id
    public = load_verifying_key(tmp_path / "state" / "ledger.pub")
    assert public.accepts(made.signing.sign(b"text"), b"text")
    assert not public.accepts(made.signing.sign(b"text"), b"other")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
    assert modes == {"ledger.key": 0o600, "site.secret": 0o600, "ledger.pub": 0o600}


@pytest.mark.parametrize(("name", "mode"), [("ledger.key", 0o640), ("site.secret", 0o604), ("site.secret", 0o620)])
def test_a_secret_that_others_may_touch_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    load_or_create_keys(tmp_path)
    (tmp_path / name).chmod(mode)
    with pytest.raises(PrivacyError, match=rf"{name} has mode 0{mode:o}, others .*; run: chmod 600 .*{name}"):
        load_or_create_keys(tmp_path)


def test_a_lost_secret_is_not_replaced(tmp_path: Path) -> None:
    """With a new one no record would be recognized, and every budget would look unspent."""
    load_or_create_keys(tmp_path)
    (tmp_path / "site.secret").unlink()
    with pytest.raises(PrivacyError, match=r"site\.secret is missing beside .*ledger\.key: restore it from a backup"):
        load_or_create_keys(tmp_path)
    assert not (tmp_path / "site.secret").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    load_or_create_keys(tmp_path)
    foreign = x25519.X25519PrivateKey.generate()
    (tmp_path / "site.secret").write_bytes(b"short")
    with pytest.raises(PrivacyError, match=r"site\.secret has 5 bytes instead of 32"):
        load_or_create_keys(tmp_path)
    (tmp_path / "ledger.key").write_text("nonsense")
    with pytest.raises(PrivacyError, match=r"ledger\.key holds no readable private key"):
        load_or_create_keys(tmp_path)
    (tmp_path / "ledger.key").write_bytes(foreign.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(PrivacyError, match=r"ledger\.key is not an Ed25519 key"):
        load_or_create_keys(tmp_path)
    (tmp_path / "ledger.pub").write_bytes(
        foreign.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(PrivacyError, match=r"the public key .*ledger\.pub is not an Ed25519 key"):
        load_verifying_key(tmp_path / "ledger.pub")
    with pytest.raises(PrivacyError, match=r"the public key .*none cannot be read"):
        load_verifying_key(tmp_path / "none")


def test_nothing_of_a_key_is_printed() -> None:
    key = SigningKey.generate()
    assert "object at" in repr(key)


def make_keys(folder: Path, gate: object, outcomes: object) -> None:
    gate.wait(600)  # type: ignore[attr-defined]
    keys = load_or_create_keys(folder)
    outcomes.put((keys.signing.key_id, keys.secret))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_processes_that_make_keys_at_once_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # safe: no thread of this process holds a lock that they need
    gate, outcomes = context.Barrier(4), context.Queue()
    processes = [context.Process(target=make_keys, args=(tmp_path, gate, outcomes)) for _ in range(4)]
    for process in processes:
        process.start()
    assert len({outcomes.get(timeout=600) for _ in processes}) == 1
    for process in processes:
        process.join(600)
