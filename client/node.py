"""The Flower SuperNode of a site: started beside the site's process, holding no more than its socket.

Two processes of Flower's: the SuperNode, which speaks to the server, and a SuperExec, which starts `flwr-clientapp` for
each message and proves itself to the SuperNode with a secret. On their PATH `client.shim` stands in front; Flower's
commands for other kinds of tasks are replaced by ones that fail, as a site runs ClientApps only.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.bundles import BUNDLES_FILE, allow_bundle, own_bundle_digest
from client.site_file import account_of, socket_path
from conf.schema.site import SiteFile, SiteNode
from protocol.errors import ConfigError

__all__ = ["NodeProcesses", "prepare_node", "run_node"]

_REFUSED = ("flwr-serverapp", "flwr-simulation", "flwr-agentapp", "flwr-model", "flwr-connector")
_INHERITED = ("LANG", "LC_ALL", "TZ", "PYTHONPATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "HTTPS_PROXY", "NO_PROXY")
_SECRET_BYTES = 32
_POLL_S, _STOP_S = 0.5, 10.0


@dataclass(frozen=True)
class NodeProcesses:
    """The commands of a site's SuperNode, and what they are started with."""

    supernode: Sequence[str]
    superexec: Sequence[str]
    environment: Mapping[str, str]
    account: pwd.struct_passwd | None
    """The other user; None for this one."""
    bundles: tuple[Path, Path] | None = None
    """The list of bundles and its copy for the other user, who cannot read the list itself."""


def prepare_node(file: SiteFile) -> NodeProcesses:
    """Write the shims, the list of bundles and the secret, and return the commands.

    A list of bundles that does not exist yet is made with this release's own bundle in it. Everything that another
    user's SuperNode needs lies beside the socket, owned by this user: the node key and the server's CA too, so that
    neither has to lie open to that user where the operator keeps it.

    Raises:
        ConfigError: the site file has no node, no TLS and no `insecure`, or a user that only root could become; the
            site was never started; or a key or certificate cannot be read.
    """
    node = file.node
    if node is None:
        raise ConfigError(
            "the site file has no `node` section, so there is no server to connect to; add node.superlink"
        )
    if node.insecure and node.root_certificates is not None:
        raise ConfigError("node.insecure and node.root_certificates contradict each other; remove one of them")
    account = account_of(node)
    _refuse_without_root(account)
    folder = socket_path(file).parent
    if not folder.is_dir():  # before anything is made: root must not make what the site's user then cannot enter
        raise ConfigError(f"{folder} does not exist; start the site first: cloister site serve")
    allowed = Path(file.state_directory) / BUNDLES_FILE
    if not allowed.exists():
        allow_bundle(allowed, own_bundle_digest(), "this release's own bundle")
    bundles = None
    if account is not None:  # who cannot enter the state directory
        bundles = allowed, folder / BUNDLES_FILE
        _copy_bundles(*bundles, account)
        allowed = folder / BUNDLES_FILE
    commands = _write_shims(folder / "bin", allowed.absolute())
    home, secret = _home(folder / "flower", account), folder / "superexec.secret"
    _write(secret, secrets.token_hex(_SECRET_BYTES), 0o600, account)
    runtime = f"127.0.0.1:{node.port}"
    transport = ["--insecure"] if node.insecure else _tls(node, folder, account)
    supernode = [
        *(_flower("flower-supernode"), "--superlink", node.superlink, *transport),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", str(node.port)),
        *("--node-config", f'socket="{socket_path(file)}"'),
    ]
    superexec = [
        *(_flower("flower-superexec"), "--runtime-api-address", runtime, "--insecure"),
        *("--superexec-auth-secret-file", str(secret)),
    ]
    return NodeProcesses(supernode, superexec, _environment(commands, home), account, bundles)


def run_node(processes: NodeProcesses) -> int:
    """Run both processes until one ends or this one is told to stop; return the exit code of the one that ended.

    Another user's copy of the list of bundles follows the list within a second.
    """
    account = processes.account
    # Nothing of a privileged process is inherited: neither groups nor environment.
    user = None if account is None else account.pw_uid
    group = None if account is None else account.pw_gid

    def begun(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=dict(processes.environment),
            cwd=processes.environment["HOME"],
            user=user,
            group=group,
            extra_groups=None if account is None else [],
        )

    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: told.append(received))
    started = [begun(*processes.supernode)]
    try:
        # The SuperExec ends with the process of that number. It asks by a signal, and another user's may not signal
        # this one: it would take it for dead, and end at once.
        parent = os.getpid() if account is None else started[0].pid
        started.append(begun(*processes.superexec, "--parent-pid", str(parent)))
        while not told and all(process.poll() is None for process in started):
            time.sleep(_POLL_S)
            if processes.bundles is not None:
                _copy_bundles(*processes.bundles, account)
        return 0 if told else next(code for process in started if (code := process.poll()) is not None)
    finally:
        _end(started)


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in started:
        process.terminate()
    deadline = time.monotonic() + _STOP_S
    for process in started:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _refuse_without_root(account: pwd.struct_passwd | None) -> None:
    if account is not None and os.getuid() != 0:
        raise ConfigError(
            f"only root can start the SuperNode as node.user={account.pw_name!r}, and this is user {os.getuid()}; "
            "start it as root, or as that user, or drop node.user"
        )


def _tls(node: SiteNode, folder: Path, account: pwd.struct_passwd | None) -> list[str]:
    """Return Flower's options for TLS and the node key; another user gets copies in `folder`."""
    options: list[str] = []
    for option, name, given in (
        ("--root-certificates", "root_certificates", node.root_certificates),
        ("--auth-supernode-private-key", "private_key", node.private_key),
    ):
        if given is None:
            continue
        path = Path(given).absolute()  # the SuperNode starts in a folder of its own
        try:
            content = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"node.{name}={given} cannot be read by user {os.getuid()}: {error}; a relative path starts from the "
                "folder in which the command is given"
            ) from error
        if account is not None:
            path = folder / f"node.{name}"
            _write(path, content, 0o600, account)
        options += [option, str(path)]
    return options


def _flower(command: str) -> str:
    """Return the path of a command of the installed Flower, wherever PATH leads."""
    beside = Path(sys.executable).parent / command
    found = str(beside) if beside.is_file() else shutil.which(command)
    if found is None:
        raise ConfigError(f"{command} is not installed beside {sys.executable}; install cloister there")
    return found


def _environment(commands: Path, home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key in _INHERITED or key.startswith("FLWR_")}
    return kept | {
        "PATH": os.pathsep.join((str(commands), str(Path(sys.executable).parent), "/usr/bin", "/bin")),
        "HOME": str(home),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def _write_shims(folder: Path, allowed: Path) -> Path:
    folder.mkdir(mode=0o755, exist_ok=True)
    folder.chmod(0o755)
    program = f"from client.shim import main; main({str(allowed)!r})"
    # -P: nothing in the folder it is started from can take a module's place.
    start = f'exec {shlex.quote(sys.executable)} -P -c {shlex.quote(program)} "$@"'
    _write(folder / "flwr-clientapp", f"#!/bin/sh\n{start}\n", 0o755)
    for name in _REFUSED:
        _write(folder / name, f"#!/bin/sh\necho '{name}: this site runs ClientApps only' >&2\nexit 1\n", 0o755)
    return folder


def _home(folder: Path, account: pwd.struct_passwd | None) -> Path:
    """Return Flower's own folder: all that its processes may write to."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if account is not None:
        os.chown(folder, account.pw_uid, account.pw_gid, follow_symlinks=False)
    return folder


def _copy_bundles(source: Path, copy: Path, reader: pwd.struct_passwd | None) -> None:
    """Bring the copy of the list up to date; a list that is gone allows nothing."""
    content = source.read_text() if source.is_file() else ""
    if not copy.is_file() or copy.read_text() != content:
        _write(copy, content, 0o600, reader)


def _write(path: Path, content: str, mode: int, reader: pwd.struct_passwd | None = None) -> None:
    """Replace a file whole; `reader`, where given, may read it too, and nobody but this user may write it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "w") as stream:
        stream.write(content)
        os.fchmod(handle, mode)  # by the handle: whoever owns the folder could exchange the name
        if reader is not None:
            os.fchown(handle, -1, reader.pw_gid)
            os.fchmod(handle, mode | 0o040)
    partial.replace(path)
