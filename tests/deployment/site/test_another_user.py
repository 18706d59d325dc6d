"""The SuperNode runs as another user: it reaches the site's socket, and nothing else that is the site's."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import CLOISTER, SiteProcess

pytestmark = [pytest.mark.slow, pytest.mark.deployment]
USER = "nobody"
Make = Callable[..., SiteProcess]

PROGRAM = """
import os, sys
from pathlib import Path
from flwr.app import RecordDict
from client.relay import relay
from protocol.records import record_to_card
run, state = Path(sys.argv[1]), Path(sys.argv[2])
print(record_to_card(relay(run / "site.sock", "query", RecordDict())).site)
for path, mode in ((state / "ledger.db", "rb"), (state / "site.secret", "rb"), (run / "allowed_bundles", "rb"),
                   (run / "allowed_bundles", "ab"), (run / "bin" / "flwr-clientapp", "ab"), (run / "new", "wb")):
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


def as_user(account: pwd.struct_passwd) -> tuple[str, ...]:
    return ("setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups")


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


def test_the_node_runs_as_the_user_that_the_site_names(
    make_site: Make, shared: Path, opened: tuple[str, ...], account: pwd.struct_passwd
) -> None:
    run = shared / "run"
    node = {"superlink": f"127.0.0.1:{free_port()}", "insecure": True, "user": USER, "port": free_port()}
    serve = {"socket": str(run / "site.sock"), "stop_grace_s": 1.0}
    site = make_site(node=node, serve=serve, state_directory=str(shared / "s"))
    site.state = shared / "s"
    site.start()
    log = site.folder / "node.log"
    with log.open("wb") as output:
        started = subprocess.Popen(
            (*opened, *CLOISTER, "site", "start", "--config", str(site.config)), stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 90
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
            (*opened, *as_user(account), sys.executable, "-c", PROGRAM, str(run), str(site.state)),
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert asked.stdout.splitlines() == [
            "harbor",
            "ledger.db rb PermissionError",
            "site.secret rb PermissionError",
            "allowed_bundles rb opened",
            "allowed_bundles ab PermissionError",
            "flwr-clientapp ab PermissionError",
            "new wb PermissionError",
        ], asked.stderr
        while log.read_text().count("retrying") < 3:  # it has no server here, and goes on all the same
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert started.poll() is None, log.read_text()
        assert children(started.pid) == found, log.read_text()
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) == 0, log.read_text()
        assert not any(Path(f"/proc/{number}").exists() for number in found.values())
    finally:
        if started.poll() is None:
            started.terminate()
            started.wait(30)
