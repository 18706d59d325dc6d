"""Each check can fail, and says what to do."""

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from conf.schema.server import ServerFile
from protocol.errors import ConfigError
from server.deployment.certificates import renew_server_certificate
from server.deployment.checks import Check, check_files
from server.deployment.folder import ServerFolder, write_new
from server.deployment.node_keys import read_node_key
from server.deployment.reachability import check_reachability


@pytest.fixture
def today(made: ServerFolder, settings: ServerFile) -> ServerFolder:
    """The folder with a certificate of today: files have today's times."""
    renew_server_certificate(made, settings.hosts, datetime.now(UTC))
    made.ca_key.unlink()
    return made


def found(folder: ServerFolder, settings: ServerFile, later: timedelta = timedelta(seconds=5)) -> dict[str, Check]:
    """Check a while after now: the files have the machine's times, and the clock is compared with them."""
    return {check.name: check for check in check_files(folder, settings, datetime.now(UTC) + later)}


def test_a_new_server_is_sound(today: ServerFolder, settings: ServerFile) -> None:
    checks = found(today, settings)
    assert {check.state for check in checks.values()} <= {"ok", "warning"}
    assert {
        "certificate",
        "authority",
        "certificate's names",
        "key files",
        "secret",
        "bundle",
        "clock",
    } <= checks.keys()
    assert {"disk of state/", "disk of runs/", "database"} <= checks.keys()


def test_an_expired_certificate_fails_and_is_warned_of_before(today: ServerFolder, settings: ServerFile) -> None:
    assert found(today, settings, timedelta(days=710))["certificate"].state == "warning"
    late = found(today, settings, timedelta(days=731))["certificate"]
    assert late.state == "failed"
    assert late.found.startswith("expired on ")
    assert "cloister server renew" in late.fix


def test_a_name_that_the_certificate_lacks_fails(today: ServerFolder, settings: ServerFile) -> None:
    renamed = settings.model_copy(update={"hosts": ("moved.example.org",)})
    check = found(today, renamed)["certificate's names"]
    assert check.state == "failed"
    assert check.found.startswith("moved.example.org: ")


def test_another_servers_key_fails(today: ServerFolder, settings: ServerFile) -> None:
    today.key.unlink()
    key = ec.generate_private_key(ec.SECP256R1())
    write_new(today.key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    assert found(today, settings)["certificate's key"].state == "failed"


def test_a_key_that_others_read_fails(today: ServerFolder, settings: ServerFile) -> None:
    today.key.chmod(0o640)
    check = found(today, settings)["key files"]
    assert check.state == "failed"
    assert "mode 0640" in check.found
    assert f"chmod 600 {today.key}" in check.fix


def test_the_authoritys_key_on_the_server_is_a_warning(made: ServerFolder, settings: ServerFile) -> None:
    check = found(made, settings)["authority's key"]
    assert check.state == "warning"
    assert "offline storage" in check.fix


def test_a_short_secret_fails(today: ServerFolder, settings: ServerFile) -> None:
    today.secret.write_bytes(b"hunter2")
    assert found(today, settings)["secret"].state == "failed"


def test_a_missing_file_is_a_failed_check_and_no_traceback(today: ServerFolder, settings: ServerFile) -> None:
    today.certificate.unlink()
    today.secret.unlink()
    checks = found(today, settings)
    assert "server.crt is no readable certificate" in checks["certificate"].found
    assert checks["secret"].state == "failed"
    assert checks["clock"].state != "failed"


def test_a_clock_behind_its_own_files_fails(today: ServerFolder, settings: ServerFile) -> None:
    today.settings.touch()
    check = found(today, settings, -timedelta(minutes=10))["clock"]
    assert check.state == "failed"
    assert "NTP" in check.fix


def test_a_damaged_database_fails(today: ServerFolder, settings: ServerFile) -> None:
    with closing(sqlite3.connect(today.database)) as connection:
        connection.execute("CREATE TABLE message (content BLOB)")
        connection.executemany("INSERT INTO message VALUES (?)", [(os.urandom(900),) for _ in range(40)])
        connection.commit()
    assert found(today, settings)["database"].state == "ok"
    with today.database.open("r+b") as stream:
        stream.seek(4096 * 2)
        stream.write(os.urandom(4096))
    assert found(today, settings)["database"].state == "failed"


def test_a_bundle_with_something_in_it_is_a_warning(today: ServerFolder, settings: ServerFile) -> None:
    (today.bundle / "rows.jsonl").write_text("{}\n")
    check = found(today, settings)["bundle"]
    assert check.state == "warning"
    assert "rows.jsonl" in check.found


def test_nothing_running_fails_with_the_commands_that_start_it(today: ServerFolder) -> None:
    closed = ServerFile(hosts=("localhost",), public_address="127.0.0.1", public_port=9, admin_port=1)
    checks = {check.name: check for check in check_reachability(today, closed)}
    assert checks["SuperLink"].state == checks["proxy"].state == "failed"
    assert f"cloister server start {today.path}" in checks["SuperLink"].fix
    assert "nginx -c" in checks["proxy"].fix


def test_check_ends_with_1_when_something_failed(today: ServerFolder) -> None:
    command = [sys.executable, "-c", "from cli.main import main; main()", "server", "check", str(today.path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "160"})
    assert result.returncode == 1
    assert "failed" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_node_keys_are_of_a_nist_curve_and_public(tmp_path: Path) -> None:
    for kind, bits in (("ecdsa", "384"), ("ed25519", "256")):
        command = ["ssh-keygen", "-q", "-t", kind, "-b", bits, "-N", "", "-f", str(tmp_path / kind)]
        subprocess.run(command, check=True)
    command = ["ssh-keygen", "-lf", str(tmp_path / "ecdsa.pub")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert read_node_key(tmp_path / "ecdsa.pub") == printed.split()[1]
    with pytest.raises(ConfigError, match=r"is a private key, which must never leave its site"):
        read_node_key(tmp_path / "ecdsa")
    with pytest.raises(ConfigError, match=r"is a Ed25519PublicKey; Flower takes keys of a NIST curve only"):
        read_node_key(tmp_path / "ed25519.pub")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ConfigError, match=r"is no public key in OpenSSH's format"):
        read_node_key(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        read_node_key(tmp_path / "missing")
