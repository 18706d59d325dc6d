"""Certificates that sites can trust, by two independent judges: Python's TLS and cryptography's verifier."""

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from conf.schema.server import ServerFile
from protocol.errors import ConfigError
from server.deployment.certificates import ALWAYS, fingerprint, read_served, renew_server_certificate
from server.deployment.folder import ServerFolder

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def test_the_certificate_is_for_the_hosts_and_for_loopback(made: ServerFolder, settings: ServerFile) -> None:
    served = read_served(made)
    assert set(served.hosts) == {*settings.hosts, *ALWAYS}
    assert served.key_fits
    for host in served.hosts:
        assert served.problem(host, NOW) == ""


@pytest.mark.parametrize("host", ["evil.example.org", "192.0.2.8"])
def test_it_is_for_nobody_else(made: ServerFolder, host: str) -> None:
    assert read_served(made).problem(host, NOW)


def test_it_ends(made: ServerFolder) -> None:
    served = read_served(made)
    assert served.problem("localhost", NOW + timedelta(days=729)) == ""
    assert served.problem("localhost", NOW + timedelta(days=731))
    assert served.problem("localhost", NOW - timedelta(days=1))


def test_renewing_keeps_the_key_and_the_authority(made: ServerFolder, settings: ServerFile) -> None:
    before = read_served(made)
    renew_server_certificate(made, (*settings.hosts, "new.example.org"), NOW + timedelta(days=700))
    after = read_served(made)
    assert after.key_fits
    assert after.problem("new.example.org", NOW + timedelta(days=1000)) == ""
    assert fingerprint(after.authority) == fingerprint(before.authority)


def test_renewing_needs_the_authoritys_key(made: ServerFolder, settings: ServerFile) -> None:
    made.ca_key.unlink()
    with pytest.raises(ConfigError, match=r"ca.key is not there; put it back from where it is kept"):
        renew_server_certificate(made, settings.hosts, NOW)


def test_a_certificate_that_is_none_is_named(made: ServerFolder) -> None:
    made.certificate.write_text("nothing")
    with pytest.raises(ConfigError, match=r"server.crt is no readable certificate"):
        read_served(made)


def test_the_keys_are_of_nist_curves(made: ServerFolder) -> None:
    served = read_served(made)
    curves = [certificate.public_key().curve for certificate in (served.authority, served.certificate)]
    assert isinstance(curves[0], ec.SECP384R1)
    assert isinstance(curves[1], ec.SECP256R1)


@pytest.mark.parametrize(("name", "accepted"), [("federation.example.org", True), ("evil.example.org", False)])
def test_openssl_agrees(made: ServerFolder, settings: ServerFile, name: str, accepted: bool) -> None:
    renew_server_certificate(made, settings.hosts, datetime.now(UTC))
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(made.certificate, made.key)
    ours = ssl.create_default_context(cafile=str(made.ca_certificate))
    ours.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve_one, args=(listener, theirs))
        thread.start()
        with socket.create_connection(listener.getsockname()) as plain:
            if accepted:
                with ours.wrap_socket(plain, server_hostname=name) as secure:
                    assert secure.version() == "TLSv1.3"
            else:
                with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
                    ours.wrap_socket(plain, server_hostname=name)
        thread.join(600)


def _serve_one(listener: socket.socket, context: ssl.SSLContext) -> None:
    connection, _ = listener.accept()
    try:
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1)
    except (ssl.SSLError, OSError):
        connection.close()
