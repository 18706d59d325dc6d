"""What `cloister server init` leaves behind: keys nobody else reads, and files that their programs accept."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from client.bundles import own_bundle_digest
from conf.schema.server import ServerFile
from protocol.bundle import RUN_CONFIG_KEYS, bundle_text
from protocol.errors import ConfigError
from server.deployment.bundle import bundle_digest, refresh_bundle
from server.deployment.files import make_server, next_steps
from server.deployment.folder import ServerFolder, find_folder, new_folder, read_settings, write_new

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
ROOT = Path(__file__).resolve().parents[4]


def test_keys_and_secret_are_for_their_owner_alone(made: ServerFolder) -> None:
    for path in (made.ca_key, made.key, made.secret):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in (made.secret.parent, made.database.parent, made.flower_home, made.runs):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert len(made.secret.read_bytes()) == 64
    assert not any(b"PRIVATE" in path.read_bytes() for path in made.for_sites.iterdir())


def test_a_key_is_never_readable_by_others_for_a_moment(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_new(tmp_path / "key", b"x", 0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_nothing_is_overwritten(made: ServerFolder, settings: ServerFile) -> None:
    before = made.key.read_bytes()
    with pytest.raises(ConfigError, match=r"exists and is not empty; keys are never overwritten"):
        new_folder(made.path)
    with pytest.raises(ConfigError, match=r"server.yaml exists; it is not overwritten"):
        write_new(made.settings, b"")
    assert made.key.read_bytes() == before


def test_two_servers_share_no_secret(tmp_path: Path, settings: ServerFile) -> None:
    folders = [new_folder(tmp_path / name) for name in ("one", "two")]
    for folder in folders:
        make_server(folder, settings, NOW)
    for each in ("secret", "key", "ca_key"):
        assert len({getattr(folder, each).read_bytes() for folder in folders}) == 2


def test_a_folder_that_systemd_or_nginx_would_misread_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has characters that systemd and nginx read in another sense"):
        new_folder(tmp_path / "my server")


def test_settings_are_read_back(made: ServerFolder, settings: ServerFile) -> None:
    assert read_settings(made) == settings
    assert find_folder(None, {"CLOISTER_SERVER": str(made.path)}) == made


def test_settings_with_problems_name_them_all(made: ServerFolder) -> None:
    made.settings.write_text("hosts: ['not a host']\nadmin_port: 0\n")
    with pytest.raises(
        ConfigError, match=r"has 3 problem\(s\):\n.*neither a host name nor an IP address(.|\n)*admin_port"
    ):
        read_settings(made)


def test_one_port_cannot_be_both(tmp_path: Path) -> None:
    arguments = ["server", "init", str(tmp_path / "s"), "--san", "a.example", "--admin-port", "443", "--yes"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "public_port and admin_port are both 443" in str(result.exception)


def test_without_a_folder_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no server's folder: it has no server.yaml.*cloister server init DIR"):
        find_folder(tmp_path, {})


def test_init_asks_for_hosts_unless_told_not_to(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["server", "init", str(tmp_path / "a"), "--yes"])
    assert "add --san federation.example.org" in str(refused.exception)
    asked = CliRunner().invoke(
        app, ["server", "init", str(tmp_path / "b")], input="fed.example.org, 192.0.2.9\n8443\n\n"
    )
    assert asked.exit_code == 0, asked.output
    assert read_settings(find_folder(tmp_path / "b")).hosts == ("fed.example.org", "192.0.2.9")
    numbers = re.findall(r"^ (\d)\. ", asked.output, re.MULTILINE)
    assert numbers == [str(number + 1) for number in range(len(numbers))]
    assert len(numbers) == 8


def test_the_steps_name_every_file_that_they_need(made: ServerFolder, settings: ServerFile) -> None:
    text = "\n".join(next_steps(made, settings))
    assert text.count(str(made.path)) >= 8
    for path in (made.ca_key, made.for_sites, made.proxy / "nginx-site.conf", made.docker / "docker-compose.yml"):
        assert str(path) in text
        assert path.exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_units(made: ServerFolder) -> None:
    units = sorted(map(str, made.systemd.glob("*.service")))
    assert len(units) == 2
    result = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Unknown" not in result.stderr


def test_the_units_keep_flower_at_home(made: ServerFolder) -> None:
    for unit in made.systemd.glob("*.service"):
        text = unit.read_text()
        for line in ("NoNewPrivileges=yes", "IPAddressDeny=any", "IPAddressAllow=localhost", "Restart=always"):
            assert line in text.splitlines()
        assert 'Environment="FLWR_TELEMETRY_ENABLED=0"' in text
        assert 'Environment="FLWR_DISABLE_UPDATE_CHECK=1"' in text
        assert 'Environment="FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1"' in text
        assert f"InaccessiblePaths=-{made.ca_key}" in text


def test_every_superlink_isolates_processes_and_asks_for_keys(made: ServerFolder) -> None:
    compose = yaml.safe_load((made.docker / "docker-compose.yml").read_text())
    unit = (made.systemd / "cloister-superlink.service").read_text()
    for command in (" ".join(compose["services"]["superlink"]["command"]), unit):
        assert "--isolation process" in command
        assert "--superexec-auth-secret-file" in command
        assert "--enable-supernode-auth" in command
        assert "--disable-runtime-dependency-installation" in command
        assert "--insecure" not in command
    assert "--host 127.0.0.1 --port 8001" in unit


def _has_compose() -> bool:
    docker = shutil.which("docker")
    asked = docker and subprocess.run((docker, "compose", "version"), capture_output=True, check=False).returncode == 0
    return bool(asked)


@pytest.mark.skipif(not _has_compose(), reason="docker compose is not installed")
def test_docker_compose_accepts_the_file(made: ServerFolder) -> None:
    file = made.docker / "docker-compose.yml"
    asked = subprocess.run(
        ("docker", "compose", "-f", str(file), "config", "--services"), capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0, asked.stderr
    assert sorted(asked.stdout.split()) == ["proxy", "superexec", "superlink"]


def test_the_compose_file_publishes_the_proxy_and_nothing_else(made: ServerFolder) -> None:
    services = yaml.safe_load((made.docker / "docker-compose.yml").read_text())["services"]
    assert {name: service.get("ports") for name, service in services.items()} == {
        "superlink": ["127.0.0.1:8001:8001"],
        "superexec": None,
        "proxy": ["8443:8443"],
    }
    assert all(service["restart"] == "always" for service in services.values())
    for service in services.values():
        mounted = [volume.split(":")[0] for volume in service["volumes"]]
        assert str(made.ca_key) not in mounted
        assert str(made.ca_key.parent) not in mounted
        assert all(Path(made.docker, source).exists() for source in mounted)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_accepts_its_configuration(made: ServerFolder) -> None:
    command = ["nginx", "-t", "-c", str(made.proxy / "nginx.conf")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("caddy") is None, reason="caddy is not installed")
def test_caddy_accepts_its_configuration(made: ServerFolder) -> None:
    command = ["caddy", "validate", "--adapter", "caddyfile", "--config", str(made.proxy / "Caddyfile")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_bundle_is_the_releases_and_the_projects(made: ServerFolder) -> None:
    """`cloister run` sends what `flwr run .` of the project sends, less what nobody needs at a site."""
    ours, project = (
        tomllib.loads(text)["tool"]["flwr"]["app"] for text in (bundle_text(), (ROOT / "pyproject.toml").read_text())
    )
    assert ours["components"] == project["components"]
    assert ours["publisher"] == project["publisher"]
    assert ours["fab-include"] == project["fab-include"] == ["pyproject.toml"]
    assert set(ours["config"]) == set(project["config"]) == set(RUN_CONFIG_KEYS)


def test_every_server_of_a_release_sends_the_same_bundle(made: ServerFolder, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "cloister"
    other.mkdir(parents=True)
    (other / "pyproject.toml").write_text(bundle_text())
    digest = bundle_digest(made.bundle)
    assert bundle_digest(other) == digest == own_bundle_digest()  # as a site of the same release computes it
    assert digest in (made.for_sites / "connection.txt").read_text()


def test_what_lies_in_the_bundles_folder_is_not_sent(made: ServerFolder) -> None:
    digest = bundle_digest(made.bundle)
    (made.bundle / "rows.jsonl").write_text('{"text": "patient has"}\n')
    (made.bundle / "client").mkdir()
    (made.bundle / "client" / "app.py").write_text("print('beside the data')\n")
    refresh_bundle(made.bundle)
    assert bundle_digest(made.bundle) == digest
    assert [path.name for path in made.bundle.rglob("*") if path.is_file()] == ["pyproject.toml"]


def test_the_templates_are_in_the_package() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert data["server.deployment"] == ["*.j2"]
    files = [path for path in (ROOT / "server" / "deployment").iterdir() if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".j2"}


def test_commands_are_those_of_this_environment(made: ServerFolder) -> None:
    unit = (made.systemd / "cloister-superexec.service").read_text()
    assert f"ExecStart={Path(sys.executable).parent}/flower-superexec " in unit
