"""A bundle that a site does not list never runs there: real SuperLink, SuperNode and SuperExec."""

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.cli.build import build_fab_from_disk

from client.bundles import bundle_digest

pytestmark = [pytest.mark.slow, pytest.mark.deployment]

PYPROJECT = """
[project]
name = "stranger"
version = "1.0.0"
[tool.flwr.app]
publisher = "stranger"
[tool.flwr.app.components]
serverapp = "stranger.server_app:app"
clientapp = "stranger.client_app:app"
"""
CLIENT = """
from pathlib import Path
Path({marker!r}).write_text("I ran beside the records")
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def query(message, context):
    return Message(RecordDict(), reply_to=message)
"""
SERVER = """
import time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    (reply,) = grid.send_and_receive([Message(RecordDict(), nodes[0], "query")], timeout=600)
    Path({answer!r}).write_text(reply.error.reason if reply.has_error() else "an answer")
"""


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A project with code in its bundle."""
    project = tmp_path / "stranger"
    (project / "stranger").mkdir(parents=True)
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "stranger" / "__init__.py").write_text("")
    (project / "stranger" / "client_app.py").write_text(CLIENT.format(marker=str(tmp_path / "marker")))
    (project / "stranger" / "server_app.py").write_text(SERVER.format(answer=str(tmp_path / "answer")))
    return project


def run(flower: Any, project: Path, answer: Path) -> str:
    """Run a project on the SuperLink and return what its ServerApp got from the node."""
    answer.unlink(missing_ok=True)
    flower.start("run", "flwr", "run", str(project), "--stream")
    deadline = time.monotonic() + 600
    while not answer.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answer.exists(), flower.logs()
    return answer.read_text()


def test_an_unlisted_bundle_never_runs(tmp_path: Path, stranger: Path, flower: Any) -> None:
    socket_folder = tmp_path / "state" / "run"
    socket_folder.mkdir(parents=True, mode=0o700)
    config = tmp_path / "site.yaml"
    site = {
        "name": "harbor",
        "published_records": 10,
        "model_path": "embedded:clinic-base",
        "data": {"source": {"path": "none.jsonl"}, "columns": {"kind": "prompt_completion"}},
        "state_directory": str(tmp_path / "state"),
        "node": {"superlink": flower.start_superlink(), "insecure": True, "port": free_port()},
    }
    config.write_text(yaml.safe_dump(site))
    cloister = (sys.executable, "-c", "from cli.main import main; main()", "site")
    flower.start("node", *cloister, "start", "--config", str(config))

    told = run(flower, stranger, tmp_path / "answer")
    digest = bundle_digest(build_fab_from_disk(stranger))
    assert f"bundle {digest[:12]} is not on this site's list" in told
    assert not (tmp_path / "marker").exists()
    assert not list((tmp_path / "state").rglob("client_app.py")), "it was not even unpacked"

    subprocess.run([*cloister, "allow-bundle", digest, "--config", str(config)], check=True, env=flower.env)
    assert run(flower, stranger, tmp_path / "answer") == "an answer", flower.logs()
    assert (tmp_path / "marker").read_text() == "I ran beside the records", "without the list it does run"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
