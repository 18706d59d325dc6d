"""A federation's own certificate authority, and the one certificate of its server (X.509, RFC 5280; SANs, RFC 9525)."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from protocol.errors import ConfigError
from server.deployment.folder import ServerFolder, write_new

__all__ = [
    "ALWAYS",
    "CA_DAYS",
    "SERVER_DAYS",
    "Served",
    "fingerprint",
    "issue_server_certificate",
    "make_authority",
    "read_certificate",
    "read_served",
    "renew_server_certificate",
]

ALWAYS = ("localhost", "127.0.0.1", "superlink")
"""Names every server certificate has: of the SuperLink as the proxy, the SuperExec and the administrator reach it."""
CA_DAYS, SERVER_DAYS = 3650, 730
_EARLIER = timedelta(hours=1)
"""Certificates are valid a little before they are made: sites' clocks differ."""


@dataclass(frozen=True)
class Served:
    """A server certificate, and what it promises."""

    certificate: x509.Certificate
    authority: x509.Certificate
    key_fits: bool

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names and addresses it is valid for."""
        try:
            names = self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return ()
        return tuple(str(name.value) for name in names)

    def problem(self, host: str, now: datetime) -> str:
        """Return why a site that trusts the authority would refuse it as `host`; empty when it would not."""
        try:
            PolicyBuilder().store(Store([self.authority])).time(now).build_server_verifier(_general_name(host)).verify(
                self.certificate, []
            )
        except VerificationError as error:
            return str(error)
        return ""


def make_authority(folder: ServerFolder, name: str, now: datetime) -> None:
    """Make the certificate authority's key (mode 0600) and its certificate.

    Raises:
        ConfigError: one of them exists.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} federation authority")])
    certificate = (
        _unsigned(subject, subject, key.public_key(), now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    write_new(folder.ca_key, _private_pem(key), 0o600)
    write_new(folder.ca_certificate, certificate.public_bytes(serialization.Encoding.PEM))


def issue_server_certificate(folder: ServerFolder, hosts: Sequence[str], now: datetime) -> None:
    """Make the server's key (mode 0600) and its certificate for `hosts` and `ALWAYS`.

    Raises:
        ConfigError: one of them exists.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _signed(folder, key.public_key(), hosts, now)
    write_new(folder.key, _private_pem(key), 0o600)
    write_new(folder.certificate, certificate)


def renew_server_certificate(folder: ServerFolder, hosts: Sequence[str], now: datetime) -> None:
    """Replace the server's certificate by a new one for the same key; sites notice nothing.

    Raises:
        ConfigError: the authority's key is not there.
    """
    public = read_certificate(folder.certificate).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    renewed = folder.certificate.with_suffix(".new")
    renewed.unlink(missing_ok=True)
    write_new(renewed, _signed(folder, public, hosts, now))
    os.replace(renewed, folder.certificate)


def read_served(folder: ServerFolder) -> Served:
    """Return the server's certificate as it lies in its folder.

    Raises:
        ConfigError: a file is missing or unreadable.
    """
    certificate = read_certificate(folder.certificate)
    key = _read_key(folder.key)
    return Served(certificate, read_certificate(folder.ca_certificate), key.public_key() == certificate.public_key())


def read_certificate(path: Path) -> x509.Certificate:
    """Return a certificate from its PEM file.

    Raises:
        ConfigError: missing or unreadable.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no readable certificate: {error}") from error


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 that people compare over the telephone."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def _signed(folder: ServerFolder, public: ec.EllipticCurvePublicKey, hosts: Sequence[str], now: datetime) -> bytes:
    if not folder.ca_key.is_file():
        raise ConfigError(f"{folder.ca_key} is not there; put it back from where it is kept for as long as this takes")
    authority, authority_key = read_certificate(folder.ca_certificate), _read_key(folder.ca_key)
    named = list(dict.fromkeys([*hosts, *ALWAYS]))
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _unsigned(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, named[0][:64])]),
            authority.subject,
            public,
            now,
            SERVER_DAYS,
        )
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in named]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(authority_key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _unsigned(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no readable key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no elliptic-curve key; cloister server init makes the right one")
    return key
