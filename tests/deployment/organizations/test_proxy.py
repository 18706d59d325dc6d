"""What comes through the proxies that `cloister server init` configures, and what does not."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.deployment.programs import Programs
from server.deployment.reachability import HIDDEN
from server.deployment.web import Door

from .conftest import Machine, Server, make_node_key

pytestmark = [pytest.mark.slow, pytest.mark.deployment, pytest.mark.rare]

PROTOBUF = {"Content-Type": "application/protobuf"}


@pytest.fixture(params=["nginx", "caddy"])
def proxied(request: pytest.FixtureRequest, machine: Machine, server: Server) -> Iterator[Server]:
    """The server behind one of the proxies."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    server.start_proxy(request.param)
    yield server
    machine.end(request.param)


def test_the_superlink_itself_answers_what_the_proxy_hides(server: Server) -> None:
    """Otherwise the next test would show nothing."""
    superlink = Door("127.0.0.1", server.admin_port, server.folder.ca_certificate)
    assert superlink.ask("POST", "/v1/control/list-runs", headers=PROTOBUF) == 200
    assert superlink.ask("GET", "/docs") == superlink.ask("GET", "/openapi.json") == 200
    assert superlink.ask("POST", "/v1/runtime/acquire-task", headers=PROTOBUF) == 401


def test_only_fleet_and_health_come_through(proxied: Server) -> None:
    assert proxied.proxy.ask("GET", "/health") == 200
    assert proxied.proxy.ask("POST", "/v1/fleet/pull-messages", headers=PROTOBUF) == 401
    for method, path in HIDDEN:
        assert proxied.proxy.ask(method, path, headers=PROTOBUF) in (400, 403, 404), path
    for path in ("/", "/health/x", "/v1/fleet/", "/v1/fleet/pull-messages/../../control/list-runs", "/v1/fleet/A"):
        assert proxied.proxy.ask("POST", path, headers=PROTOBUF) in (400, 403, 404), path
    assert proxied.proxy.ask("GET", "/v1/fleet/pull-messages") in (403, 404, 405)


def test_what_the_superlink_gets_is_the_path_that_was_matched(proxied: Server) -> None:
    """The SuperLink alone answers 401; a path that it does not know would be a 404."""
    for path in ("//v1/fleet/pull-messages", "/v1/x/../fleet/pull-messages", "/v1/fleet/%70ull-messages"):
        assert proxied.proxy.ask("POST", path, headers=PROTOBUF) == 401, path


def test_large_messages_come_through_and_larger_ones_do_not(proxied: Server) -> None:
    """Flower's chunks have 5 MiB. Without a node key they are refused by the SuperLink, so they have arrived there."""
    assert proxied.proxy.ask("POST", "/v1/fleet/push-object", b"\0" * (6 << 20), PROTOBUF) in (400, 401, 422)


def test_check_notices_a_proxy_that_hides_nothing(machine: Machine, server: Server) -> None:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    site = server.folder.proxy / "nginx-site.conf"
    kept = site.read_text()
    site.write_text(kept.replace("^/v1/fleet/[a-z-]+\\z", "^/"))
    try:
        server.start_proxy("nginx")
        checked = server.check()
    finally:
        site.write_text(kept)
        machine.end("nginx")
    assert checked.returncode == 1
    assert "the proxy forwards /v1/control/list-runs" in " ".join(checked.stdout.replace("│", " ").split())


def test_a_superexec_without_the_secret_gets_no_work(machine: Machine, server: Server, tmp_path: Path) -> None:
    wrong = tmp_path / "secret"
    wrong.write_bytes(b"x" * 64)
    command = list(Programs(server.folder, server.admin_port).superexec)
    command[command.index(str(server.folder.secret))] = str(wrong)
    before = _turned_away(server)
    machine.start("thief", *command)
    machine.wait("a refusal", lambda: _turned_away(server) > before)
    machine.kill("thief")


def test_a_superlink_that_was_killed_comes_back_with_its_nodes(machine: Machine, server: Server) -> None:
    key = machine.folder / "lone" / "node"
    key.parent.mkdir()
    make_node_key(key)
    server.command("server", "register", f"{key}.pub")
    (superlink,) = machine.processes("flower-superlink")
    os.kill(superlink, signal.SIGKILL)
    time.sleep(0.5)
    machine.wait("another SuperLink", lambda: machine.processes("flower-superlink") not in ([], [superlink]))
    machine.wait("it to answer", lambda: "1 registered" in server.check().stdout, poll_s=1)


def _turned_away(server: Server) -> int:
    return (server.folder.database.parent / "superlink.log").read_text().count('acquire-task HTTP/1.1" 401')
