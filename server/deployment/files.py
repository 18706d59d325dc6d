"""The files that start a server, rendered from templates beside this module."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from conf.schema.server import ServerFile
from server.deployment.bundle import bundle_digest, write_bundle
from server.deployment.certificates import (
    fingerprint,
    issue_server_certificate,
    make_authority,
    read_certificate,
)
from server.deployment.folder import ServerFolder, write_new
from server.deployment.programs import Programs

__all__ = ["INSIDE", "make_server", "next_steps"]

INSIDE = Path("/srv/cloister")
"""Where a server's folder appears inside a container."""
SECRET_BYTES = 64


def make_server(folder: ServerFolder, server: ServerFile, now: datetime) -> None:
    """Fill an empty folder with keys, settings and everything that starts the server.

    Raises:
        ConfigError: something of it exists.
    """
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.path.chmod(0o755)  # nginx and the SuperLink's user pass through it; keys have modes of their own
    for private in (
        folder.secret.parent,
        folder.database.parent,
        folder.flower_home,
        folder.runs,
        folder.kept,
        folder.submitted,
    ):
        private.mkdir(mode=0o700)
    write_new(folder.settings, yaml.safe_dump(server.model_dump(mode="json"), sort_keys=False).encode())
    make_authority(folder, server.name, now)
    issue_server_certificate(folder, server.hosts, now)
    write_new(folder.secret, secrets.token_bytes(SECRET_BYTES), 0o600)
    write_bundle(folder.bundle)
    for path, content in _rendered(folder, server).items():
        write_new(path, content.encode())
    (folder.proxy / "work").mkdir(mode=0o700)
    (folder.docker / "wheels").mkdir()
    write_new(folder.for_sites / "ca.crt", folder.ca_certificate.read_bytes())


def next_steps(folder: ServerFolder, server: ServerFile) -> Sequence[str]:
    """Return what the operator does after `cloister server init`, in order."""
    path, units = folder.path, f"{server.name}-superlink {server.name}-superexec"
    return (
        f"Move {folder.ca_key} to offline storage: it is needed again only for cloister server renew.",
        "Start SuperLink and SuperExec, one of:\n"
        f"   systemd   useradd --system {server.name}; chown -R {server.name}: {path}; cp {folder.systemd}/*.service "
        f"/etc/systemd/system/; systemctl enable --now {units}\n"
        f"   docker    put the release's wheel into {folder.docker}/wheels; "
        f"docker compose -f {folder.docker}/docker-compose.yml up --build -d   (brings the proxy)\n"
        f"   neither   cloister server start {path}",
        "Start the proxy, one of:\n"
        f"   nginx     ln -s {folder.proxy}/nginx-site.conf /etc/nginx/sites-enabled/{server.name}; "
        "systemctl reload nginx\n"
        f"   caddy     caddy run --config {folder.proxy}/Caddyfile\n"
        f"   alone     nginx -c {folder.proxy}/nginx.conf -g 'daemon off;'",
        f"Open TCP port {server.public_port} to the sites, and no other; {server.admin_port} stays on loopback.",
        f"Give every site the folder {folder.for_sites}, and compare its two digests by another channel.",
        f"Register each site's node key, which the site made and whose private half stays there: "
        f"cloister server register SITE.pub --server {path}",
        f"Check everything: cloister server check {path}",
        f"Start a run: cloister run --server {path} experiment=smoke federation.expected_sites=3",
    )


def _rendered(folder: ServerFolder, server: ServerFile) -> dict[Path, str]:
    inside = ServerFolder(INSIDE)
    here = Programs(folder, server.admin_port)
    contained = Programs(
        inside, server.admin_port, scripts=Path("/usr/local/bin"), listen="0.0.0.0", reached_as="superlink"
    )
    common: dict[str, Any] = {
        "server": server,
        "folder": folder,
        "programs": here,
        "user": server.name,
        "version": version("cloister"),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "uid": os.getuid(),
        "gid": os.getgid(),
        "superlink": f"127.0.0.1:{server.admin_port}",
        "superlink_name": "localhost",
        "listen": _listen(server.public_address, server.public_port),
        "site": folder.proxy / "nginx-site.conf",
        "work": folder.proxy / "work",
        "authority": fingerprint(read_certificate(folder.ca_certificate)),
        "bundle": bundle_digest(folder.bundle),
    }
    in_docker = common | {"programs": contained}
    proxied = common | {
        "folder": inside,
        "superlink": f"superlink:{server.admin_port}",
        "superlink_name": "superlink",
        "listen": str(server.public_port),
    }
    templates = Environment(
        loader=PackageLoader("server.deployment", "."),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return {
        path: templates.get_template(f"{name}.j2").render(values)
        for path, name, values in (
            (folder.systemd / f"{server.name}-superlink.service", "superlink.service", common),
            (folder.systemd / f"{server.name}-superexec.service", "superexec.service", common),
            (folder.proxy / "nginx-site.conf", "nginx-site.conf", common),
            (folder.proxy / "nginx.conf", "nginx.conf", common),
            (folder.proxy / "Caddyfile", "Caddyfile", common),
            (folder.docker / "Dockerfile", "Dockerfile", in_docker),
            (folder.docker / "docker-compose.yml", "docker-compose.yml", in_docker),
            (folder.docker / "nginx-site.conf", "nginx-site.conf", proxied),
            (folder.flower_home / "config.toml", "flower-config.toml", common),
            (folder.for_sites / "connection.txt", "connection.txt", common),
        )
    }


def _listen(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
