"""A SuperLink and a SuperExec in the foreground, for servers with neither systemd nor Docker."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from protocol.errors import FederationError
from server.deployment.programs import Programs
from server.deployment.web import Door

__all__ = ["supervise"]

_RESTARTS, _WITHIN_S = 5, 60.0
"""A process that ends more often than this is broken, not unlucky."""
_POLL_S = 0.5


@dataclass
class _Kept:
    """One process that is started again when it ends."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=_RESTARTS))

    def start(self) -> None:
        with self.log.open("ab") as stream:
            # A session of its own: Ctrl-C reaches this program alone, which then ends the others in order.
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def watch(self, say: Callable[[str], None], now: float) -> None:
        """Start the process again if it ended.

        Raises:
            FederationError: it ends again and again.
        """
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return
        if len(self.ends) == _RESTARTS and now - self.ends[0] < _WITHIN_S:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise FederationError(
                f"the {self.name} ended {_RESTARTS + 1} times within {_WITHIN_S:.0f} s, last with code {code}; "
                f"the end of {self.log}:\n{tail}"
            )
        self.ends.append(now)
        say(f"{self.name} ended with code {code}; it is started again, and runs go on")
        self.start()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def supervise(programs: Programs, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
    """Run SuperLink and SuperExec until SIGINT or SIGTERM; either is started again when it ends.

    Raises:
        FederationError: one of them ends again and again.
    """
    state = programs.folder.database.parent
    environment = _inherited() | programs.environment
    superlink = _Kept("SuperLink", programs.superlink, environment, state / "superlink.log")
    superexec = _Kept("SuperExec", programs.superexec, environment, state / "superexec.log")
    told = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        superlink.start()
        _wait_for(programs, superlink, say, clock)
        say(f"SuperLink answers on 127.0.0.1:{programs.admin_port}; its log: {superlink.log}")
        superexec.start()
        say(f"SuperExec started; its log: {superexec.log}")
        while True:
            superlink.watch(say, clock())
            superexec.watch(say, clock())
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        superexec.stop()
        superlink.stop()
        signal.signal(signal.SIGTERM, told)


def _wait_for(programs: Programs, superlink: _Kept, say: Callable[[str], None], clock: Callable[[], float]) -> None:
    door = Door("127.0.0.1", programs.admin_port, programs.folder.ca_certificate)
    while True:
        superlink.watch(say, clock())
        with suppress(OSError, HTTPException, ssl.SSLError):
            if door.ask("GET", "/health") == 200:
                return
        time.sleep(_POLL_S)


def _inherited() -> dict[str, str]:
    """Return the environment without what would change Flower's behavior."""
    return {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
