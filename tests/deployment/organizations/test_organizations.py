"""Two organizations train together, a third refuses; a site and the SuperLink are killed; the adapter stays the same.

The run is private, with real noise. It can still be repeated bit by bit, because a site's randomness follows from its
secret and its inputs: the comparison runs the same site files with copies of the secrets, in one process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Context
from safetensors.torch import load_file

from client.app import client_app
from client.site import Site, open_site
from conf.compose import compose_experiment
from protocol.errors import SiteRefusal
from server.app import Launch, serve
from simulations.in_process import InProcessGrid
from simulations.population import build_population

from .conftest import Machine, Organization, Server, free_port, make_node_key

pytestmark = [
    pytest.mark.slow,
    pytest.mark.deployment,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]

FLOWER_SUPERNODE = str(Path(sys.executable).parent / "flower-supernode")
SITES = ("eastfield", "harbor", "northgate")
ROUNDS, KILLED_SITE_IN, KILLED_SUPERLINK_IN = 4, 1, 3
OVERRIDES = (
    "experiment=smoke",
    f"federation.rounds={ROUNDS}",
    "federation.local.steps=2",
    f"federation.expected_sites={len(SITES)}",
    "federation.reply_timeout_s=120",
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=1.0",
    f"evaluation.every={ROUNDS}",
    "evaluation.max_examples=20",
    "runtime.threads=1",
)
CANARY = "the patient of room {name}-4711 answers to Quillfeather"


@dataclass(frozen=True)
class Story:
    """What happened, and what it left behind."""

    server: Server
    sites: dict[str, Organization]
    run: Path
    summary: dict[str, Any]
    log: str
    seconds: float

    def accepted(self, round_number: int) -> list[str]:
        """Whose updates a round used."""
        return sorted(self.summary["rounds"][round_number - 1]["accepted"])

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [event for line in lines if (event := json.loads(line))["kind"] == kind]


@pytest.fixture(scope="module")
def sites(machine: Machine, server: Server) -> dict[str, Organization]:
    """Three organizations with different records, budgets and policies, their node keys registered."""
    server.start_proxy()
    parts = build_population(compose_experiment(OVERRIDES)).parts
    made: dict[str, Organization] = {}
    for name in SITES:
        rows = [dict(row) for row in parts[name][:300]] + [{"prompt": "Note:", "completion": CANARY.format(name=name)}]
        made[name] = Organization(machine, server, name, rows)
        server.command("server", "register", f"{made[name].key}.pub")
    made["harbor"].write(
        budget={"epsilon": 12.0, "delta": 1e-5},
        policy={"require_approval": False, "max_rounds": ROUNDS, "max_clip_norm": 10.0},
    )
    made["northgate"].write(policy={"require_approval": False, "min_noise_multiplier": 2.0})
    for ready in [site.serve() for site in made.values()]:
        ready()
    for site in made.values():
        site.start_node()
    return made


@pytest.fixture(scope="module")
def story(machine: Machine, server: Server, sites: dict[str, Organization]) -> Story:
    began = time.monotonic()
    run = server.run(*OVERRIDES)
    harbor, eastfield = sites["harbor"], sites["eastfield"]

    machine.wait("harbor to have reserved its first round", lambda: "reserve" in harbor.entries(), 120, poll_s=0.005)
    harbor.kill()
    assert "commit" not in harbor.entries()
    harbor.serve()()

    def in_round() -> bool:
        return eastfield.entries().count("reserve") >= KILLED_SUPERLINK_IN

    machine.wait(f"round {KILLED_SUPERLINK_IN}", in_round, 120, poll_s=0.02)
    (superlink,) = machine.processes("flower-superlink")
    os.kill(superlink, signal.SIGKILL)

    machine.wait("the run to end", (run / "summary.json").exists, 180)
    machine.wait("its status", lambda: "finished:completed" in server.command("runs"), 60)
    summary = json.loads((run / "summary.json").read_text())
    return Story(server, sites, run, summary, server.command("logs", run.name), time.monotonic() - began)


def test_the_run_completes(story: Story) -> None:
    assert story.summary["status"] == "finished", story.server.machine.logs()
    assert f"{ROUNDS} of {ROUNDS}" in story.server.command("runs")
    assert "SuperLink ended with code -9; it is started again" in story.server.machine.log("server")
    assert "run directory:" in story.log


def test_each_round_used_the_sites_that_could_answer(story: Story) -> None:
    assert story.accepted(KILLED_SITE_IN) == ["eastfield"]
    assert story.accepted(KILLED_SUPERLINK_IN) == ["eastfield", "harbor"]
    assert story.accepted(ROUNDS) == ["eastfield", "harbor"]


def test_one_site_refuses_every_round_with_a_code_and_nothing_else(story: Story) -> None:
    replies = [event for event in story.events("site_replied") if event["site"] == "northgate"]
    assert [event["accepted"] for event in replies] == [False] * ROUNDS
    assert {event["code"] for event in replies} == {"noise_too_small"}
    assert story.sites["northgate"].entries() == []


def test_a_killed_site_is_down_for_the_server_and_has_lost_nothing(story: Story) -> None:
    missed = [event for event in story.events("site_replied") if event["site"] == "harbor" and not event["accepted"]]
    assert {event["code"] for event in missed} == {"site_down"}
    kinds = story.sites["harbor"].entries()
    # What was reserved when the process was killed stays spent, though nothing left.
    assert kinds.count("reserve") == kinds.count("commit") + 1
    assert kinds.count("commit") == ROUNDS - len(missed)


def test_every_ledger_says_what_the_server_was_told(story: Story) -> None:
    for name in ("eastfield", "harbor"):
        replies = [event for event in story.events("site_replied") if event["site"] == name and event["accepted"]]
        told = [event["privacy"] for event in replies]
        spent = [statement["epsilon_run"] for statement in told]
        assert spent == sorted(spent)
        assert 0 < spent[-1] <= told[-1]["epsilon_budget"] == story.sites[name].content["budget"]["epsilon"]
        assert told[-1]["steps_executed"] == 2 * story.sites[name].entries().count("reserve")
        assert not told[-1]["insecure_seed"]


def test_the_ledger_of_the_killed_site_holds(story: Story) -> None:
    verified = story.server.machine.cloister("ledger", "verify", "--site", str(story.sites["harbor"].config))
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_the_adapter_is_that_of_the_same_sites_in_one_process(story: Story, tmp_path: Path) -> None:
    missed = {(event["site"], event["round"]) for event in story.events("site_replied") if event["code"] == "site_down"}
    repeated = in_one_process(story, tmp_path, missed)
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (story.run, repeated))
    assert ours.keys() == theirs.keys()
    assert any(tensor.abs().max() > 1e-3 for name, tensor in ours.items() if "lora_B" in name)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_no_record_reaches_the_server(story: Story) -> None:
    for site in SITES:
        canary = CANARY.format(name=site).encode()
        assert canary in (story.sites[site].folder / "records.jsonl").read_bytes()
        found = [path for path in story.server.folder.path.rglob("*") if path.is_file() and canary in path.read_bytes()]
        assert found == []


def test_check_finds_nothing_wrong(story: Story) -> None:
    checked = story.server.check()
    assert checked.returncode == 0, checked.stdout
    assert "3 registered, 3 online" in checked.stdout
    assert "control, runtime, /docs and /openapi.json are not forwarded" in checked.stdout


def test_a_run_can_be_stopped(story: Story) -> None:
    run = story.server.run(*OVERRIDES, "federation.rounds=1000", "federation.expected_sites=99")
    assert f"stopped  {run.name}" in story.server.command("stop", run.name)
    assert "finished:stopped" in story.server.command("runs")


def test_a_node_key_that_was_not_registered_is_refused(story: Story, machine: Machine, tmp_path: Path) -> None:
    stranger = tmp_path / "node"
    make_node_key(stranger)
    ended = supernode(story.server, machine, "--auth-supernode-private-key", str(stranger))
    assert ended.returncode != 0
    assert "Failed to activate" in ended.stdout + ended.stderr


def test_a_node_without_a_key_is_refused(story: Story, machine: Machine) -> None:
    ended = supernode(story.server, machine)
    assert ended.returncode != 0


def test_tls_is_required(story: Story, machine: Machine) -> None:
    for port in (story.server.public_port, story.server.admin_port):
        plain = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            plain.request("GET", "/health")
            status = plain.getresponse().status
        except (OSError, HTTPException):
            continue
        assert status == 400  # nginx says so to whoever speaks plain HTTP
    ended = supernode(story.server, machine, "--insecure", "--max-retries", "1", tls=False)
    assert ended.returncode != 0


def supernode(server: Server, machine: Machine, *options: str, tls: bool = True) -> subprocess.CompletedProcess[str]:
    trust = ("--root-certificates", str(server.folder.for_sites / "ca.crt")) if tls else ()
    # Without a SuperExec, which would outlive a SuperNode that gives up.
    place = ("--superlink", server.address, "--port", str(free_port()), "--isolation", "process")
    command = (FLOWER_SUPERNODE, *place, *trust, *options)
    return subprocess.run(command, env=machine.env, capture_output=True, text=True, check=False, timeout=60)


def in_one_process(story: Story, folder: Path, missed: set[tuple[str, int]]) -> Path:
    """Run the same experiment with the same site files and secrets, less the replies that were missed."""
    opened: dict[str, Site] = {}
    for name, site in story.sites.items():
        state = folder / name
        state.mkdir(mode=0o700)
        secret = site.state / "site.secret"
        if secret.exists():
            shutil.copy(secret, state / "site.secret")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(site.content | {"state_directory": str(state)}))
        opened[name] = open_site(folder / f"{name}.yaml")

    def find(context: Context) -> Site:
        return opened[SITES[int(context.node_config["partition-id"])]]

    experiment = compose_experiment(OVERRIDES)
    path = folder / story.run.name
    grid = InProcessGrid(client_app(find), [{"partition-id": position} for position in range(len(SITES))])
    for name, round_number in missed:
        _be_down(opened[name], round_number)
    serve(grid, Launch(experiment, path, waits_forever=True))
    for site in opened.values():
        site.close()
    return path


def _be_down(site: Site, round_number: int) -> None:
    """Let a site answer one round as one that is not running."""
    handle = site.handle

    def answer(instruction: Any) -> Any:
        if instruction.header.round == round_number:
            raise SiteRefusal("site_down", "not running")
        return handle(instruction)

    site.handle = answer  # type: ignore[method-assign]
