"""Organizations on loopback: a server behind its proxy, sites with files of their own, all as operators start them."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from conf.schema.site import SiteFile
from server.deployment.folder import ServerFolder
from server.deployment.web import Door

CLOISTER = (sys.executable, "-c", "import sys; sys.argv[0] = 'cloister'; from cli.main import main; main()")
HOST = "federation.test"


HANGS_S = 600


class Machine:
    """Starts processes that end with the test, with homes in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "CLOISTER_"))}
        self.env = inherited | {
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
            "TERM": "dumb",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            # The tests' own copy of the packages, in every process that is started.
            "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
        }

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a process whose output is added to `NAME.log`."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._started[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self._started[name]

    def kill(self, name: str) -> None:
        """Kill -9 what was started under a name."""
        self._started[name].kill()
        self._started[name].wait()

    def end(self, name: str) -> None:
        """End what was started under a name, and what it started itself."""
        self._started[name].terminate()
        self._started[name].wait(600)

    def cloister(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            (*CLOISTER, *arguments),
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def wait(self, what: str, done: Callable[[], object], poll_s: float = 0.2) -> None:
        """Wait until something is true, however slow the machine is; the bound stops what hangs."""
        deadline = time.monotonic() + HANGS_S
        while time.monotonic() < deadline:
            if done():
                return
            time.sleep(poll_s)
        pytest.fail(f"waited {HANGS_S} s for {what}\n{self.logs()}")

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        """Return the end of every log, for the message of a failed test."""
        paths = [path for path in sorted(self.folder.rglob("*.log")) if path.is_file()]
        return "\n".join(f"===== {path.name} =====\n{path.read_text(errors='replace')[-3000:]}" for path in paths)

    def processes(self, command: str) -> list[int]:
        """Return the processes of this machine whose command line has a word."""
        return [number for number in self._alive() if command in _words(number)]

    def stop(self) -> None:
        """End everything, first politely, then not."""
        for chosen in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 60
            while (alive := self._alive()) and time.monotonic() < deadline:
                for number in alive:
                    with suppress(ProcessLookupError):
                        os.kill(number, chosen)
                time.sleep(0.3)
        assert not self._alive()

    def _alive(self) -> list[int]:
        """Return this machine's processes: each has its folder in its environment. nginx writes over its own, so what
        was started here is known by itself besides, with all of its group."""
        mark = f"={self.folder}".encode()
        groups = {started.pid for started in self._started.values() if started.poll() is None}
        found: list[int] = []
        for folder in Path("/proc").glob("[0-9]*"):
            number = int(folder.name)
            with suppress(OSError):
                if mark in (folder / "environ").read_bytes() or os.getpgid(number) in groups:
                    found.append(number)
        return found


def _words(number: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


class Server:
    """A federation's server in its folder."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.folder = ServerFolder(machine.folder / "server")
        self.public_port, self.admin_port = free_port(), free_port()
        ports = ("--public-port", str(self.public_port), "--admin-port", str(self.admin_port))
        names = ("--san", HOST, "--san", "127.0.0.1", "--listen", "127.0.0.1")
        made = machine.cloister("server", "init", str(self.folder.path), *names, *ports, "--yes")
        assert made.returncode == 0, made.stderr
        self.said = made.stdout
        offline = machine.folder / "offline"
        offline.mkdir()
        shutil.move(self.folder.ca_key, offline / "ca.key")

    @property
    def address(self) -> str:
        """What sites are told."""
        return f"127.0.0.1:{self.public_port}"

    def start(self) -> None:
        self.machine.start("server", *CLOISTER, "server", "start", str(self.folder.path))
        self.machine.wait("the SuperExec", lambda: "SuperExec started" in self.machine.log("server"))

    def start_proxy(self, program: str = "nginx") -> None:
        proxy = self.folder.proxy
        commands = {
            "nginx": ("nginx", "-c", str(proxy / "nginx.conf"), "-g", "daemon off;"),
            "caddy": ("caddy", "run", "--adapter", "caddyfile", "--config", str(proxy / "Caddyfile")),
        }
        self.machine.start(program, *commands[program])
        self.machine.wait(program, lambda: _status(self.proxy, "GET", "/health") in (200, 502))

    @property
    def proxy(self) -> Door:
        """The server as sites see it."""
        return Door("127.0.0.1", self.public_port, self.folder.ca_certificate, HOST)

    def command(self, *arguments: str) -> str:
        """Run a command against this server and return what it prints."""
        ended = self.machine.cloister(*arguments, "--server", str(self.folder.path))
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def check(self) -> subprocess.CompletedProcess[str]:
        return self.machine.cloister("server", "check", str(self.folder.path))

    def run(self, *overrides: str) -> Path:
        """Submit a run and return its run directory."""
        said = self.command("run", *overrides)
        (name,) = [line.split()[1] for line in said.splitlines() if line.startswith("run ")]
        return self.folder.runs / name


class Organization:
    """A site: its records, its file, its own process, and its SuperNode."""

    def __init__(self, machine: Machine, server: Server, name: str, rows: list[dict[str, Any]]) -> None:
        self.machine, self.name = machine, name
        self.folder = machine.folder / name
        self.folder.mkdir()
        self.config, self.state = self.folder / "site.yaml", self.folder / "s"
        records = self.folder / "records.jsonl"
        records.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.key = self.folder / "node"
        make_node_key(self.key)
        self.content: dict[str, Any] = {
            "name": name,
            "published_records": len(rows),
            "model_path": "embedded:clinic-base",
            "data": {"source": {"path": str(records)}, "columns": {"kind": "prompt_completion"}},
            "budget": {"epsilon": 20.0, "delta": 1e-4},
            "policy": {"require_approval": False},
            "runtime": {"threads": 1, "device": "cpu"},
            "serve": {"stop_grace_s": 1.0},
            "state_directory": str(self.state),
            "node": {
                "superlink": server.address,
                "root_certificates": str(server.folder.for_sites / "ca.crt"),
                "private_key": str(self.key),
                "port": free_port(),
            },
        }
        self.write()
        (named,) = [line.split()[2] for line in server.said.splitlines() if line.startswith("bundle SHA-256")]
        allowed = machine.cloister("site", "allow-bundle", named, "--config", str(self.config))
        assert allowed.returncode == 0, allowed.stderr

    def write(self, **sections: Mapping[str, Any]) -> None:
        """Write the site's file, with sections replaced."""
        self.content |= sections
        self.config.write_text(yaml.safe_dump(self.content))

    @property
    def file(self) -> SiteFile:
        return SiteFile.model_validate(self.content)

    @property
    def public_key(self) -> str:
        """In hex, as the site itself says it once it serves."""
        said = re.findall(r"its card is signed by the key ([0-9a-f]{64}) ", self.machine.log(f"{self.name}-serve"))
        return said[-1]

    def serve(self) -> Callable[[], None]:
        """Start the site's own process, and return what waits until it listens."""
        log = f"{self.name}-serve"
        before = self.machine.log(log).count("listens at")
        self.machine.start(log, *CLOISTER, "site", "serve", "--config", str(self.config))
        return lambda: self.machine.wait(
            f"{self.name} to listen", lambda: self.machine.log(log).count("listens at") > before
        )

    def kill(self) -> None:
        """Kill -9 the site's own process."""
        self.machine.kill(f"{self.name}-serve")

    def start_node(self) -> None:
        """Start the site's SuperNode, which runs the bundle that the server's operator named and no other."""
        self.machine.start(f"{self.name}-node", *CLOISTER, "site", "start", "--config", str(self.config))

    def entries(self) -> list[str]:
        """Return the kinds of the ledger's entries, in order; none before there is a ledger."""
        path = self.state / "ledger.db"
        if not path.exists():
            return []
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
            return [kind for (kind,) in ledger.execute("SELECT kind FROM entries ORDER BY sequence")]
        return []


def make_node_key(path: Path) -> None:
    """Make a node key as `ssh-keygen -t ecdsa -b 384` does."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    path.with_name(f"{path.name}.pub").write_bytes(
        key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _status(door: Door, method: str, path: str) -> int:
    with suppress(OSError):
        return door.ask(method, path)
    return 0


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("org"))
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def server(machine: Machine) -> Server:
    """A server that runs, without a proxy yet."""
    made = Server(machine)
    made.start()
    return made
