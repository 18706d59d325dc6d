"""Three accounts: the site's user, root, who starts the SuperNode, and the SuperNode's user, who reaches the socket,
the server and nothing else that is the site's."""

import base64
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
)

from server.deployment.certificates import issue_server_certificate, make_authority
from server.deployment.folder import ServerFolder

from .conftest import CLOISTER, SiteProcess

pytestmark = [pytest.mark.slow, pytest.mark.deployment, pytest.mark.rare]
SITE_USER, USER = "daemon", "nobody"
Headers = dict[str, str]

PROGRAM = """
import os, sys
from pathlib import Path
from client.relay import relay
from protocol.records import challenge_to_record, record_to_card
run, state, folder = map(Path, sys.argv[1:])
print(record_to_card(relay(run / "site.sock", "query", challenge_to_record(bytes(32)))).site)
for path, mode in (
    (state / "ledger.db", "rb"),
    (state / "site.secret", "rb"),
    (folder / "node", "rb"),
    (run / "node.private_key", "rb"),
    (run / "node.private_key", "ab"),
    (run / "allowed_bundles", "rb"),
    (run / "allowed_bundles", "ab"),
    (run / "bin" / "flwr-clientapp", "ab"),
    (run / "new", "wb"),
):
    try:
        open(path, mode).close()
    except OSError as error:
        print(path.name, mode, type(error).__name__)
    else:
        print(path.name, mode, "opened")
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users may pass through; those of pytest let nobody in."""
    path = Path(tempfile.mkdtemp(prefix="cloister-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


OPEN = """
set -e
mkdir -p "$1"
mount --bind "$2/$3" "$1"
mount -t tmpfs -o mode=755 tmpfs "$2"
mkdir "$2/$3"
mount --bind "$1" "$2/$3"
shift 3
exec "$@"
"""


@pytest.fixture
def opened(shared: Path) -> tuple[str, ...]:
    """What root starts a command through so that other users can run this Python. It may lie in a folder that nobody
    else may enter, such as root's home; then the command sees nothing else of that folder."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    program = Path(sys.executable).resolve()
    closed = next((each for each in reversed(program.parents) if not each.stat().st_mode & 0o001), None)
    if closed is None:
        return ()
    inside = program.relative_to(closed).parts[0]
    return ("unshare", "--mount", "sh", "-c", OPEN, "sh", str(shared / "kept"), str(closed), inside)


@pytest.fixture
def account(opened: tuple[str, ...]) -> pwd.struct_passwd:
    found = pwd.getpwnam(USER)
    tried = subprocess.run((*opened, *as_user(found), sys.executable, "-c", "import client.shim"), cwd="/", check=False)
    if tried.returncode:
        pytest.skip(f"user {USER} cannot run {sys.executable} with these packages")
    return found


def as_user(account: pwd.struct_passwd, *groups: int) -> tuple[str, ...]:
    further = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return ("setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", further)


@pytest.fixture
def busy(shared: Path) -> Iterator[tuple[ServerFolder, int, list[Headers]]]:
    """A server with a certificate of its own authority; its folder, its port and the headers that it was sent.
    It puts everybody off, as a proxy does whose SuperLink is down."""
    place, headers = ServerFolder(shared / "server"), list[Headers]()
    for each in (place.ca_key, place.key, place.certificate):
        each.parent.mkdir(parents=True, exist_ok=True)
    make_authority(place, "test", datetime.now(UTC))
    issue_server_certificate(place, ["127.0.0.1"], datetime.now(UTC))

    class Busy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            headers.append({name.lower(): value for name, value in self.headers.items()})
            self.send_error(503)

        def log_message(self, *_: Any) -> None:
            pass

    served = HTTPServer(("127.0.0.1", 0), Busy)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place.certificate, place.key)
    served.socket = context.wrap_socket(served.socket, server_side=True)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    try:
        yield place, served.server_address[1], headers
    finally:
        served.shutdown()
        served.server_close()
        thread.join(600)


def proves(headers: Headers, key: ec.EllipticCurvePrivateKey) -> bool:
    """Return whether a request was signed with a key, as a SuperLink with node authentication wants it."""
    signature = base64.b64decode(headers["flwr-signature"])
    signed = next(value for name, value in headers.items() if name.endswith("timestamp"))
    key.public_key().verify(signature, signed.encode(), ec.ECDSA(hashes.SHA256()))
    return True


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def facts(process: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {key: rest.split() for key, _, rest in (line.partition(":") for line in lines)}


def children(process: int) -> dict[str, int]:
    """Return a process's children by the name of Flower's command."""
    found: dict[str, int] = {}
    for number in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        words = Path(f"/proc/{number}/cmdline").read_bytes().decode().split("\0")
        found |= {Path(word).name: int(number) for word in words if Path(word).name.startswith("flower-")}
    return found


@pytest.fixture
def site(shared: Path, rows: list[dict[str, Any]]) -> Iterator[SiteProcess]:
    """A site that belongs to its own user, with a node key that nobody else can read."""
    folder, owner = shared / "site", pwd.getpwnam(SITE_USER)
    folder.mkdir()
    made = SiteProcess(folder, rows)
    key = ec.generate_private_key(ec.SECP384R1())
    private = folder / "node"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    private.chmod(0o600)
    for path in (folder, private):
        os.chown(path, owner.pw_uid, owner.pw_gid)
    shared.chmod(0o777)  # where the site's user makes the folder of the socket
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def test_the_node_runs_as_the_user_that_the_site_names(
    site: SiteProcess,
    busy: tuple[ServerFolder, int, list[Headers]],
    shared: Path,
    opened: tuple[str, ...],
    account: pwd.struct_passwd,
) -> None:
    run, (place, server, headers) = shared / "run", busy
    shutil.copy(place.ca_certificate, site.folder)
    # As docs/deploy.md has it: `site start` is given in the folder of these files.
    node = {"root_certificates": "ca.crt", "private_key": "node", "user": USER, "port": free_port()}
    serve = {"socket": str(run / "site.sock"), "stop_grace_s": 1.0}
    site.change(node={"superlink": f"127.0.0.1:{server}", **node}, serve=serve)
    owner = pwd.getpwnam(SITE_USER)
    site.start(*opened, "env", f"HOME={site.folder}", *as_user(owner, account.pw_gid))
    log = site.folder / "node.log"
    with log.open("wb") as output:
        command = (*opened, *CLOISTER, "site", "start", "--config", str(site.config))
        started = subprocess.Popen(command, cwd=site.folder, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 600
        while len(found := children(started.pid)) < 2:
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert found.keys() == {"flower-supernode", "flower-superexec"}
        for number in found.values():
            seen = facts(number)
            assert seen["Uid"] == [str(account.pw_uid)] * 4
            assert seen["Gid"] == [str(account.pw_gid)] * 4
            assert seen["Groups"] == []
            environment = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
            assert f"HOME={run / 'flower'}".encode() in environment
            assert Path(f"/proc/{number}/cwd").readlink() == run / "flower"
        asked = subprocess.run(
            (*opened, *as_user(account), sys.executable, "-c", PROGRAM, str(run), str(site.state), str(site.folder)),
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert asked.stdout.splitlines() == [
            "harbor",
            "ledger.db rb PermissionError",
            "site.secret rb PermissionError",
            "node rb PermissionError",
            "node.private_key rb opened",
            "node.private_key ab PermissionError",
            "allowed_bundles rb opened",
            "allowed_bundles ab PermissionError",
            "flwr-clientapp ab PermissionError",
            "new wb PermissionError",
        ], asked.stderr
        while log.read_text().count("retrying") < 3:  # its server is down, and it goes on all the same
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        key = load_ssh_private_key((site.folder / "node").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert headers
        assert all(proves(each, key) for each in headers)
        listed = (site.state / "allowed_bundles").stat()
        assert listed.st_uid == owner.pw_uid, "root made it, and the site's user adds to it"
        assert started.poll() is None, log.read_text()
        assert children(started.pid) == found, log.read_text()
        started.send_signal(signal.SIGTERM)
        assert started.wait(600) == 0, log.read_text()
        assert not any(Path(f"/proc/{number}").exists() for number in found.values())
    finally:
        if started.poll() is None:
            started.terminate()
            started.wait(600)
