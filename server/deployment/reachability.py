"""What answers where: the SuperLink on loopback alone, and through the proxy nothing but what sites need."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Sequence
from http.client import HTTPException

from conf.schema.server import ServerFile
from protocol.errors import CloisterError
from server.deployment.checks import Check
from server.deployment.flower import Flower
from server.deployment.folder import ServerFolder
from server.deployment.programs import Programs
from server.deployment.web import Door

__all__ = ["HIDDEN", "check_reachability"]

HIDDEN = (
    ("POST", "/v1/control/list-runs"),
    ("POST", "/v1/control/start-run"),
    ("POST", "/v1/runtime/acquire-task"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("POST", "/v1/fleet/../control/list-runs"),
    ("POST", "/v1/fleet/%2e%2e/control/list-runs"),
    ("POST", "/v1/fleet/..%2fcontrol/list-runs"),
    ("POST", "//v1/control/list-runs"),
    ("POST", "/v1/fleet/pull-messages%0a"),
    ("POST", "/v1/fleet/pull-messages%0d"),
    ("POST", "/v1/fleet/pull-messages%0d%0a"),
    ("POST", "/v1/fleet/pull-messages%0aX-Header:%20x"),
)
"""What must look as if it did not exist to whoever comes through the proxy, in several spellings."""
_PROTOBUF = {"Content-Type": "application/protobuf", "Accept": "application/protobuf"}
_FAILURES = (OSError, HTTPException)  # ssl.SSLError is an OSError


def check_reachability(folder: ServerFolder, server: ServerFile) -> Iterator[Check]:
    """Yield what the processes tell: SuperLink, proxy, names, and the sites that are registered."""
    superlink = Door("127.0.0.1", server.admin_port, folder.ca_certificate)
    if (check := _answers("SuperLink", superlink, f"start it: cloister server start {folder.path}")).state == "ok":
        yield check
        yield _closed_to_strangers(superlink)
        yield _on_loopback_only(server)
        yield _nodes(folder, server)
    else:
        yield check
    yield _name(server)
    proxy = Door(_proxy_address(server), server.public_port, folder.ca_certificate, server.hosts[0])
    start = f"start it: nginx -c {folder.proxy}/nginx.conf -g 'daemon off;', or see the steps of cloister server init"
    yield (check := _answers("proxy", proxy, start))
    if check.state == "ok":
        yield _forwards_fleet(proxy)
        yield _hides(proxy, folder)


def _answers(name: str, door: Door, fix: str) -> Check:
    where = f"{door.address}:{door.port}"
    try:
        status = door.ask("GET", "/health")
    except ssl.SSLError as error:
        reason = f"another program listens on {where}, or it was started with other certificates: restart it"
        return Check(name, "failed", f"{where} shows no certificate of ca.crt for {door.name}: {error.reason}", reason)
    except _FAILURES as error:
        return Check(name, "failed", f"{where} does not answer: {error}", fix)
    if status != 200:
        return Check(name, "failed", f"{where}/health answers {status}", f"see its log; {fix}")
    return Check(name, "ok", f"answers on {where} as {door.name}")


def _closed_to_strangers(superlink: Door) -> Check:
    """Whoever lacks a node key, or the SuperExec's secret, must get nothing even without the proxy."""
    answers = {
        path: superlink.ask("POST", path, headers=_PROTOBUF)
        for path in ("/v1/fleet/pull-messages", "/v1/runtime/acquire-task")
    }
    open_ = [f"{path} answers {status}" for path, status in answers.items() if status != 401]
    if open_:
        fix = (
            "start it by cloister server start or by the units and files of cloister server init: node authentication, "
        )
        return Check(
            "authentication", "failed", "; ".join(open_), f"{fix}process isolation and the secret are always on"
        )
    return Check("authentication", "ok", "without a node key or the secret: 401")


def _on_loopback_only(server: ServerFile) -> Check:
    reached = [address for address in _own_addresses() if _connects(address, server.admin_port)]
    if reached:
        fix = "start the SuperLink with --host 127.0.0.1, as cloister server start does: who reaches it may submit runs"
        found = f"port {server.admin_port} answers on {', '.join(reached)}"
        return Check("admin port", "failed", found, fix)
    return Check("admin port", "ok", f"{server.admin_port} answers on loopback alone")


def _nodes(folder: ServerFolder, server: ServerFile) -> Check:
    try:
        nodes = Flower(Programs(folder, server.admin_port)).nodes()
    except CloisterError as error:
        return Check("sites", "failed", str(error), "see state/superlink.log")
    counted = [status for _, status in nodes if status not in ("unregistered", "deleted")]
    text = f"{len(counted)} registered, {counted.count('online')} online"
    return Check(
        "sites", "ok" if counted else "warning", text, f"cloister server register SITE.pub --server {folder.path}"
    )


def _name(server: ServerFile) -> Check:
    host = server.hosts[0]
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)})
    except OSError as error:
        return Check("name", "warning", f"{host}: {error}", "enter it in the DNS, or sites cannot find this server")
    return Check("name", "ok", f"{host} is {', '.join(found)}")


def _forwards_fleet(proxy: Door) -> Check:
    try:
        status = proxy.ask("POST", "/v1/fleet/pull-messages", headers=_PROTOBUF)
    except _FAILURES as error:
        return Check("what sites need", "failed", str(error), "see the proxy's log")
    if status != 401:
        fix = "use the rendered proxy configuration, and see that its SuperLink address is right"
        return Check("what sites need", "failed", f"/v1/fleet/pull-messages answers {status}, not 401", fix)
    return Check("what sites need", "ok", "/v1/fleet/* is forwarded, and asks for a node key")


def _hides(proxy: Door, folder: ServerFolder) -> Check:
    seen: list[str] = []
    for method, path in HIDDEN:
        try:
            status = proxy.ask(method, path, headers=_PROTOBUF if method == "POST" else None)
        except _FAILURES:
            continue
        if status not in (400, 403, 404):
            seen.append(f"{path} ({status})")
    if seen:
        fix = (
            f"stop the proxy now, then use {folder.proxy}/nginx-site.conf: who reaches these can run code at every site"
        )
        return Check("what sites must not see", "failed", f"the proxy forwards {', '.join(seen)}", fix)
    return Check("what sites must not see", "ok", "control, runtime, /docs and /openapi.json are not forwarded")


def _proxy_address(server: ServerFile) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.public_address, server.public_address)


def _own_addresses() -> Sequence[str]:
    """Return this machine's addresses but loopback, as far as its name tells."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError:
        return ()
    return sorted(address for address in found if not address.startswith("127.") and address != "::1")


def _connects(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=2):
            return True
    except OSError:
        return False
