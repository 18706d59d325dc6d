"""Processes of a bench on loopback: a SuperLink, SuperNodes and sites, ended with the block that uses them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.request import urlopen

__all__ = ["Processes", "free_port"]

_WAIT_S, _STOP_S = 180.0, 10.0


class Processes:
    """A SuperLink, and what is started beside it. Each writes to a log in the folder."""

    def __init__(self, folder: Path) -> None:
        """Prepare; entering the block starts the SuperLink."""
        self.folder = folder
        self.superlink = f"127.0.0.1:{free_port()}"
        self._started: list[subprocess.Popen[bytes]] = []
        home = folder / "flower"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "{self.superlink}"\ninsecure = true\n'
        )
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "CLOISTER_"))}
        self._environment = kept | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def __enter__(self) -> Self:
        """Start the SuperLink and wait until it answers."""
        host, port = self.superlink.split(":")
        self.start("superlink", "flower-superlink", "--insecure", "--host", host, "--port", port)
        try:
            self._wait("superlink", self._answers)
        except RuntimeError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """End everything, the newest first."""
        for process in reversed(self._started):
            self.end(process)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a process in a group of its own."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def start_supernode(self) -> subprocess.Popen[bytes]:
        """Start a SuperNode as Flower ships it."""
        port = str(free_port())
        link = ("--insecure", "--superlink", self.superlink)
        return self.start("supernode", "flower-supernode", *link, "--host", "127.0.0.1", "--port", port)

    def bundle(self, project: Path, server: str, client: str, keys: Sequence[str]) -> bytes:
        """Write a project that names two apps and holds no code, and return what Flower packs of it."""
        from flwr.cli.build import build_fab_from_disk

        project.mkdir()
        (project / "pyproject.toml").write_text(
            f'[project]\nname = "{project.name}"\nversion = "1.0.0"\n\n'
            '[tool.flwr.app]\npublisher = "cloister"\nfab-include = ["pyproject.toml"]\n\n'
            f'[tool.flwr.app.components]\nserverapp = "{server}"\nclientapp = "{client}"\n\n'
            "[tool.flwr.app.config]\n" + "".join(f'{key} = ""\n' for key in keys)
        )
        return build_fab_from_disk(project)

    def run(self, project: Path, config: Mapping[str, str]) -> None:
        """Submit a run."""
        file = self.folder / f"{project.name}.toml"
        file.write_text("".join(f"{key} = '''{value}'''\n" for key, value in config.items()))
        self.start(f"{project.name}-run", "flwr", "run", str(project), "--stream", "--run-config", str(file))

    def wait_for(self, name: str, words: str) -> None:
        """Wait until a process has written something.

        Raises:
            RuntimeError: it does not; with the end of every log.
        """
        self._wait(f"{name}: {words}", lambda: words in (self.folder / f"{name}.log").read_text(errors="replace"))

    def wait_for_file(self, path: Path) -> Path:
        """Wait until a file is there, and return it.

        Raises:
            RuntimeError: it is not written; with the end of every log.
        """
        self._wait(path.name, path.exists)
        return path

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End a process and what it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)

    def _answers(self) -> bool:
        with suppress(OSError), urlopen(f"http://{self.superlink}/health", timeout=2):
            return True
        return False

    def _wait(self, what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            if done():
                return
            time.sleep(0.1)
        logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))
        raise RuntimeError(f"waited {_WAIT_S:g} s for {what}\n{logs}")


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
