"""What must hold for a server: each check says what it found and, where it fails, what to do."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from conf.schema.server import ServerFile
from protocol.bundle import bundle_text
from protocol.errors import CloisterError
from server.deployment.certificates import ALWAYS, read_served
from server.deployment.files import SECRET_BYTES
from server.deployment.folder import ServerFolder

__all__ = ["Check", "check_files", "guarded"]

State = Literal["ok", "warning", "failed"]
_RENEW_WITHIN = timedelta(days=30)
_DISK_NEEDED, _DISK_WANTED = 1 << 30, 5 << 30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `fix` says what to do unless it is ok."""

    name: str
    state: State
    found: str
    fix: str = ""


def guarded(name: str, checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Yield the checks; what stops them from being made is a failed check itself."""
    try:
        yield from checks()
    except (CloisterError, OSError, sqlite3.Error, ValueError) as error:
        yield Check(name, "failed", str(error), "put the file back, or make a new server: cloister server init DIR")


def check_files(folder: ServerFolder, server: ServerFile, now: datetime) -> Iterator[Check]:
    """Yield what the folder alone tells: certificates, keys, secret, bundle, clock, disk, database."""
    yield from guarded("certificate", lambda: _certificates(folder, server, now))
    yield from guarded("key files", lambda: _modes(folder))
    yield from guarded("secret", lambda: _secret(folder))
    yield from guarded("bundle", lambda: _bundle(folder))
    yield from guarded("clock", lambda: _clock(folder, now))
    yield from guarded("disk", lambda: _disk(folder))
    yield from guarded("database", lambda: _database(folder))


def _certificates(folder: ServerFolder, server: ServerFile, now: datetime) -> Iterator[Check]:
    served = read_served(folder)
    renew = f"put ca.key back for a moment, then: cloister server renew {folder.path}; restart SuperLink and proxy"
    for name, certificate in (("certificate", served.certificate), ("authority", served.authority)):
        ends = certificate.not_valid_after_utc
        text = f"valid until {ends:%Y-%m-%d}"
        fix = renew if name == "certificate" else "make a new server and give every site its ca.crt"
        if now < certificate.not_valid_before_utc:
            yield Check(
                name, "failed", f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M}", "set the clock"
            )
        elif now >= ends:
            yield Check(name, "failed", f"expired on {ends:%Y-%m-%d}", fix)
        else:
            yield Check(name, "warning" if ends - now < _RENEW_WITHIN else "ok", text, fix)
    if not served.key_fits:
        yield Check("certificate's key", "failed", f"{folder.key} is not the key of {folder.certificate}", renew)
    problems = {host: served.problem(host, now) for host in (*server.hosts, *ALWAYS)}
    wrong = [f"{host}: {problem}" for host, problem in problems.items() if problem]
    if wrong:
        yield Check("certificate's names", "failed", "; ".join(wrong), f"name every host in server.yaml, then {renew}")
    else:
        yield Check("certificate's names", "ok", f"signed by ca.crt for {', '.join(problems)}")


def _modes(folder: ServerFolder) -> Iterator[Check]:
    present = [path for path in (folder.key, folder.secret, folder.ca_key) if path.exists()]
    loose = [path for path in present if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if loose:
        named = ", ".join(f"{path} has mode {stat.S_IMODE(path.stat().st_mode):04o}" for path in loose)
        yield Check(
            "key files", "failed", named, f"chmod 600 {' '.join(map(str, loose))}; make new ones if others read them"
        )
    else:
        yield Check("key files", "ok", "readable by their owner alone")
    if folder.ca_key in present:
        yield Check(
            "authority's key",
            "warning",
            f"{folder.ca_key} lies on the server",
            "move it to offline storage: whoever has it can pose as this server before every site",
        )


def _secret(folder: ServerFolder) -> Iterator[Check]:
    size = len(folder.secret.read_bytes())
    if size < SECRET_BYTES // 2:
        fix = f"head -c {SECRET_BYTES} /dev/urandom > {folder.secret}; restart SuperLink and SuperExec"
        yield Check("secret", "failed", f"{folder.secret} has {size} bytes", fix)
    else:
        yield Check("secret", "ok", f"{size} bytes")


def _bundle(folder: ServerFolder) -> Iterator[Check]:
    files = sorted(str(path.relative_to(folder.bundle)) for path in folder.bundle.rglob("*") if path.is_file())
    if files != ["pyproject.toml"] or (folder.bundle / "pyproject.toml").read_text() != bundle_text():
        fix = "the next cloister run writes it anew; tell the sites the new digest after a change of release"
        yield Check("bundle", "warning", f"holds {', '.join(files) or 'nothing'}, not the release's one file", fix)
    else:
        yield Check("bundle", "ok", "the release's one file")


def _clock(folder: ServerFolder, now: datetime) -> Iterator[Check]:
    fix = "set the clock by NTP: a site's signature counts for about five minutes"
    paths = [folder.settings, folder.database, *folder.submitted.glob("*.json")]
    newest = max(datetime.fromtimestamp(path.stat().st_mtime, UTC) for path in paths if path.exists())
    if newest - now > timedelta(minutes=2):
        yield Check("clock", "failed", f"it is {now:%Y-%m-%d %H:%M} but files are from {newest:%Y-%m-%d %H:%M}", fix)
    elif _synchronized() is False:
        yield Check("clock", "warning", f"{now:%Y-%m-%d %H:%M} UTC, not synchronized", fix)
    else:
        yield Check("clock", "ok", f"{now:%Y-%m-%d %H:%M} UTC")


def _synchronized() -> bool | None:
    """Return what systemd says of the clock; None where it says nothing."""
    if shutil.which("timedatectl") is None:
        return None
    try:
        said = subprocess.run(
            ["timedatectl", "show", "--property=NTPSynchronized", "--value"],
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"yes": True, "no": False}.get(said)


def _disk(folder: ServerFolder) -> Iterator[Check]:
    for name, path in (("disk of state/", folder.database.parent), ("disk of runs/", folder.runs)):
        free = shutil.disk_usage(path).free
        fix = "make room: the SuperLink keeps every message of a round, run directories keep checkpoints"
        state: State = "failed" if free < _DISK_NEEDED else "warning" if free < _DISK_WANTED else "ok"
        yield Check(name, state, f"{free / 1e9:.1f} GB free", fix)
        if not os.access(path, os.W_OK):
            yield Check(name, "failed", f"{path} cannot be written", "chown it to the user of the SuperLink")


def _database(folder: ServerFolder) -> Iterator[Check]:
    if not folder.database.exists():
        yield Check("database", "ok", "none yet; the SuperLink makes it")
        return
    with closing(sqlite3.connect(f"file:{folder.database}?mode=ro", uri=True, timeout=10)) as connection:
        (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    size = _size(folder.database)
    if said == "ok":
        yield Check("database", "ok", f"whole, {size / 1e6:.1f} MB")
    else:
        fix = "stop the SuperLink, restore the file from a backup or move it away (nodes are then registered anew)"
        yield Check("database", "failed", f"{folder.database}: {said}", fix)


def _size(path: Path) -> int:
    return sum(item.stat().st_size for item in path.parent.glob(f"{path.name}*"))
