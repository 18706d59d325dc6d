"""A server's folder, as `cloister server init` makes it."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from conf.schema.server import ServerFile
from server.deployment.files import make_server
from server.deployment.folder import ServerFolder, new_folder

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def settings() -> ServerFile:
    return ServerFile(hosts=("federation.example.org", "192.0.2.7"), public_port=8443, admin_port=8001)


@pytest.fixture
def made(tmp_path: Path, settings: ServerFile) -> ServerFolder:
    folder = new_folder(tmp_path / "server")
    make_server(folder, settings, NOW)
    return folder
