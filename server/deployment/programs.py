"""The command lines and the environment of a server's processes: one source for systemd, Docker and `server start`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from server.deployment.folder import ServerFolder

__all__ = ["Programs"]


@dataclass(frozen=True)
class Programs:
    """How a server's processes are started.

    Telemetry, update checks and the installation of packages at run time are off. The SuperLink runs no code of a run
    (process isolation); who wants its work must know the secret.
    """

    folder: ServerFolder
    admin_port: int
    scripts: Path = Path(sys.executable).parent
    """Where Flower's programs are."""
    listen: str = "127.0.0.1"
    reached_as: str = "127.0.0.1"
    """The SuperLink's name for the SuperExec."""

    @property
    def environment(self) -> dict[str, str]:
        """What these processes need to know."""
        return {
            "CLOISTER_HOME": str(self.folder.path),
            "FLWR_HOME": str(self.folder.flower_home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "PATH": f"{self.scripts}:/usr/local/bin:/usr/bin:/bin",
            "PYTHONUNBUFFERED": "1",
        }

    @property
    def superlink(self) -> tuple[str, ...]:
        """Routes messages; the only process that sites reach, through the proxy."""
        folder = self.folder
        return (
            str(self.scripts / "flower-superlink"),
            *("--ssl-ca-certfile", str(folder.ca_certificate)),
            *("--ssl-certfile", str(folder.certificate)),
            *("--ssl-keyfile", str(folder.key)),
            "--enable-supernode-auth",
            *("--isolation", "process"),
            *("--superexec-auth-secret-file", str(folder.secret)),
            "--disable-runtime-dependency-installation",
            *("--database", str(folder.database)),
            *("--host", self.listen),
            *("--port", str(self.admin_port)),
        )

    @property
    def superexec(self) -> tuple[str, ...]:
        """Starts the ServerApp of each run."""
        return (
            str(self.scripts / "flower-superexec"),
            *("--runtime-api-address", f"{self.reached_as}:{self.admin_port}"),
            *("--root-certificates", str(self.folder.ca_certificate)),
            *("--superexec-auth-secret-file", str(self.folder.secret)),
        )

    @property
    def nginx(self) -> tuple[str, ...]:
        """The proxy, without an installation of its own."""
        return ("nginx", "-c", str(self.folder.proxy / "nginx.conf"), "-g", "daemon off;")
