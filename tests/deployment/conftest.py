"""Real Flower processes for a test: own home, free ports, loopback only, and nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOG_TAIL = 6000


class FlowerProcesses:
    """The processes of one test, found again by the Flower home that only they have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.flower_home = folder / "flower"
        self.cloister_home = folder / "cloister"
        self.flower_home.mkdir(parents=True)
        self._started: list[subprocess.Popen[bytes]] = []
        scripts = Path(sys.executable).parent
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "RAY_"))}
        self.env = inherited | {
            "FLWR_HOME": str(self.flower_home),
            "CLOISTER_HOME": str(self.cloister_home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def start(self, name: str, *command: str) -> None:
        """Start a process whose output goes to `NAME.log`."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._started.append(process)

    def flwr_run(self, name: str, run_config: dict[str, str], *arguments: str, timeout_s: float = 1800) -> None:
        """Run `flwr run` on the project and wait for the end of the run."""
        config = self.folder / f"{name}.toml"
        config.write_text("".join(f"{key} = '''{value}'''\n" for key, value in run_config.items()))
        command = ("flwr", "run", str(ROOT), *arguments, "--stream", "--run-config", str(config))
        self.start(name, *command)
        try:
            self._started[-1].wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{' '.join(command)} took more than {timeout_s} s\n{self.logs()}")

    def start_superlink(self) -> str:
        """Start a SuperLink, wait until it answers, make it the default of `flwr run`, and return its address."""
        port = free_port()
        address = f"127.0.0.1:{port}"
        (self.flower_home / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "{address}"\ninsecure = true\n'
        )
        self.start("superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            with suppress(URLError, ConnectionError, TimeoutError), urlopen(f"http://{address}/health", timeout=60):
                return address
            time.sleep(0.2)
        pytest.fail(f"the SuperLink did not come up\n{self.logs()}")

    def start_supernode(self, name: str, superlink: str, node_config: str = "") -> None:
        options = ["--node-config", node_config] if node_config else []
        port = str(free_port())
        self.start(
            name,
            "flower-supernode",
            "--insecure",
            "--superlink",
            superlink,
            "--host",
            "127.0.0.1",
            "--port",
            port,
            *options,
        )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        """Return the end of every process's log, for the message of a failed test."""
        paths = [*sorted(self.folder.glob("*.log")), *sorted(self.flower_home.rglob("*.log"))]
        return "\n".join(f"===== {path.name} =====\n{path.read_text(errors='replace')[-LOG_TAIL:]}" for path in paths)

    def stop(self) -> None:
        """End every process of this test: those started here, and those that they started."""
        for chosen in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 60
            while (alive := self.alive()) and time.monotonic() < deadline:
                for process in alive:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(process, chosen)
                time.sleep(0.3)
                for started in self._started:
                    started.poll()

    def alive(self) -> list[int]:
        """Return the processes that were given a home in this test's folder, whoever started them."""
        mark = f"HOME={self.folder.parent}/".encode()
        found: list[int] = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[FlowerProcesses]:
    """Yield Flower's processes with a home of their own."""
    processes = FlowerProcesses(tmp_path / "flower-processes")
    try:
        yield processes
    finally:
        processes.stop()
        assert not processes.alive()
