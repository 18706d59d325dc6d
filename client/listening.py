"""Where a site's process listens, and to whom: a Unix socket of one user, or a loopback port with a token."""

from __future__ import annotations

import grp
import hmac
import json
import os
import pwd
import secrets
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from client.site_file import account_of, socket_path
from conf.schema.site import SiteFile
from protocol.errors import ConfigError
from protocol.frames import receive_frame

__all__ = ["Listener", "check_folder", "open_listener"]

_TOKEN_BYTES = 32
_TOKEN_FRAME = 2 * _TOKEN_BYTES
_MAX_PATH = 100
"""Systems differ; Linux takes 107 bytes."""


@dataclass(frozen=True)
class Listener:
    """An open socket, and who may speak to it."""

    socket: socket.socket
    path: Path
    users: frozenset[int]
    """Whose processes may connect, by user id; asked of the kernel where it tells."""
    token: str | None
    """What a connection on the loopback port must begin with."""

    def admits(self, connection: socket.socket) -> bool:
        """Return whether a new connection comes from whom it may."""
        if self.token is not None:
            given = receive_frame(connection, _TOKEN_FRAME)
            return given is not None and hmac.compare_digest(given, self.token.encode())
        if not hasattr(socket, "SO_PEERCRED"):
            return True  # the modes of socket and folder are the guard
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return struct.unpack("3i", credentials)[1] in self.users

    def close(self) -> None:
        """Stop listening and remove the socket's file."""
        self.socket.close()
        self.path.unlink(missing_ok=True)


def open_listener(file: SiteFile) -> Listener:
    """Return the socket of a site. The caller holds the site's lock, so what lies at its path is a leftover.

    The folder has mode 0700 and the socket 0600; where the SuperNode runs as another user, 0750 and 0660 with that
    user's group.

    Raises:
        ConfigError: the folder is open to others, the path too long, the SuperNode's user unknown, or this user no
            member of that user's group.
    """
    path, guest = socket_path(file), account_of(file.node)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_folder(file)
    if guest is not None and path.parent.stat().st_uid == os.getuid():  # root's own arrangement is left as it is
        _share(path.parent, guest, 0o750)
    path.unlink(missing_ok=True)
    users = {os.getuid()} | (set() if guest is None else {guest.pw_uid})
    unix = file.serve.listen == "unix" or (file.serve.listen == "auto" and hasattr(socket, "AF_UNIX"))
    if unix and len(os.fsencode(path)) > _MAX_PATH:
        raise ConfigError(f"the socket's path has more than {_MAX_PATH} bytes: {path}; set a shorter serve.socket")
    listening, token = _unix(path) if unix else _tcp(path)
    if guest is None:
        path.chmod(0o600)
    else:
        _share(path, guest, 0o660)
    return Listener(listening, path, frozenset(users), token)


def _unix(path: Path) -> tuple[socket.socket, None]:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listening.bind(str(path))
    finally:
        os.umask(before)
    listening.listen(16)
    return listening, None


def _tcp(path: Path) -> tuple[socket.socket, str]:
    """Listen on a free loopback port; a file in the socket's place tells the relay the port and the token."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=16)
    token = secrets.token_hex(_TOKEN_BYTES)
    address = {"port": listening.getsockname()[1], "token": token}
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as stream:
        stream.write(json.dumps(address))
    return listening, token


def check_folder(file: SiteFile) -> None:
    """Check that the socket's folder, where there is one already, lets nobody in but this user and the SuperNode's.

    Raises:
        ConfigError: it lets others in, belongs to somebody else, or the SuperNode's user does not exist.
    """
    folder, guest = socket_path(file).parent, account_of(file.node)
    wanted = 0o700 if guest is None else 0o750
    if not folder.exists():
        return
    found = folder.stat()
    if found.st_mode & 0o777 & ~wanted or found.st_uid not in (os.getuid(), 0):
        raise ConfigError(
            f"{folder} has mode {found.st_mode & 0o777:04o} and owner {found.st_uid}, so others could put a socket of "
            f"their own there; make it a folder of its own: chmod {wanted:04o} {folder}"
        )


def _share(path: Path, guest: pwd.struct_passwd, mode: int) -> None:
    """Give a path to the group of the SuperNode's user.

    Raises:
        ConfigError: this user may not: it is no member of the group.
    """
    try:
        os.chown(path, -1, guest.pw_gid)
    except PermissionError as error:
        group, this = _group_name(guest.pw_gid), _user_name(os.getuid())
        raise ConfigError(
            f"user {this} cannot give {path} to the group {group} of node.user={guest.pw_name!r}, of which it is no "
            f"member; run as root: usermod -aG {group} {this}; then start the site in a new session of {this}"
        ) from error
    path.chmod(mode)


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
