"""Flower's own command line, asked on behalf of a server's folder, and its answers turned into what to do."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import CloisterError, ConfigError, FederationError
from server.deployment.programs import Programs

__all__ = ["Flower", "FlowerRun"]

_ADVICE: tuple[tuple[str, type[CloisterError], str], ...] = (
    (
        "is unavailable",
        FederationError,
        "the SuperLink at {address} does not answer; start it (cloister server start {path}, or its systemd unit) and "
        "see cloister server check {path}",
    ),
    (
        "certificate verify failed",
        FederationError,
        "the SuperLink at {address} shows a certificate that tls/ca.crt of {path} has not signed: another SuperLink "
        "listens there, or it was started before its certificate was renewed",
    ),
    (
        "Invalid run configuration",
        ConfigError,
        "the bundle in {path} declares other run settings than this release sends; run this command with the release "
        "that is installed for the SuperLink",
    ),
    ("Run ID not found", ConfigError, "the SuperLink at {address} knows no such run; cloister runs lists them"),
    ("already finished", ConfigError, "the run has already ended; cloister runs shows how"),
    (
        "already in use",
        ConfigError,
        "this node key is registered already; one key is one site, and a second site makes its own",
    ),
)
_SECONDS = 120.0


@dataclass(frozen=True)
class FlowerRun:
    """A run as the SuperLink knows it. Times are ISO 8601; `elapsed` is in seconds."""

    run_id: str
    status: str
    details: str
    elapsed: float
    pending_at: str


@dataclass(frozen=True)
class Flower:
    """The administrator's connection to one SuperLink."""

    programs: Programs

    @property
    def address(self) -> str:
        """The SuperLink's address on this machine."""
        return f"127.0.0.1:{self.programs.admin_port}"

    def submit(self, bundle: Path, run_config: Path) -> str:
        """Start a run and return Flower's number of it.

        Raises:
            CloisterError: saying what to do.
        """
        return str(self._ask("run", str(bundle), "cloister", "--run-config", str(run_config))["run-id"])

    def runs(self) -> list[FlowerRun]:
        """Return every run the SuperLink knows, the oldest first.

        Raises:
            CloisterError: saying what to do.
        """
        found = [
            FlowerRun(
                run["run-id"],
                run["status"],
                "" if run["status-details"] in (None, "", "N/A") else run["status-details"],
                float(run["elapsed"]),
                run["pending-at"],
            )
            for run in self._ask("ls", "cloister")["runs"]
        ]
        return sorted(found, key=lambda run: run.pending_at)

    def stop(self, run_id: str) -> None:
        """Stop a run.

        Raises:
            CloisterError: saying what to do.
        """
        self._ask("stop", run_id, "cloister")

    def register(self, public_key: Path) -> str:
        """Register a site's node key and return the node's number.

        Raises:
            CloisterError: saying what to do.
        """
        return str(self._ask("supernode", "register", str(public_key), "cloister")["node-id"])

    def nodes(self) -> list[tuple[str, str]]:
        """Return number and status of every registered node.

        Raises:
            CloisterError: saying what to do.
        """
        return [(node["node-id"], node["status"]) for node in self._ask("supernode", "list", "cloister")["nodes"]]

    def log(self, run_id: str, *, follow: bool) -> None:
        """Print a run's log; with `follow`, until the run ends.

        Raises:
            CloisterError: saying what to do.
        """
        command = self._command("log", run_id, "cloister", "--stream" if follow else "--show")
        ended = subprocess.run(command, env=self._environment(), stderr=subprocess.PIPE, text=True, check=False)
        if ended.returncode:
            raise self.advice(" ".join(ended.stderr.split()))

    def _ask(self, *arguments: str) -> dict[str, Any]:
        command = self._command(*arguments, "--format", "json")
        try:
            ended = subprocess.run(
                command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise FederationError(
                f"flwr {arguments[0]} had no answer from {self.address} within {_SECONDS:.0f} s; "
                f"see cloister server check {self.programs.folder.path}"
            ) from error
        answer = _json_in(ended.stdout)
        # Flower's commands end with 0 even when their JSON says that they failed.
        if not answer.get("success"):
            raise self.advice(str(answer.get("error-message") or ended.stderr or ended.stdout))
        return answer

    def advice(self, said: str) -> CloisterError:
        """Return the error that says what to do about what Flower said."""
        values = {"address": self.address, "path": self.programs.folder.path}
        for mark, error, advice in _ADVICE:
            if mark in said:
                return error(advice.format(**values))
        last = said.strip().splitlines()[-1].strip() if said.strip() else "nothing"
        return FederationError(f"Flower at {self.address} said: {last}")

    def _command(self, *arguments: str) -> list[str]:
        return [str(self.programs.scripts / "flwr"), *arguments]

    def _environment(self) -> dict[str, str]:
        # A wide terminal: Flower wraps its messages, and a wrapped message is not recognized.
        return dict(os.environ) | self.programs.environment | {"COLUMNS": "1000", "TERM": "dumb"}


def _json_in(text: str) -> dict[str, Any]:
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
