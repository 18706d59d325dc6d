"""Two organizations train together, a third refuses, a fourth lies; site, ServerApp (twice) and SuperLink are killed;
the adapter stays the same.

The run is private, with real noise. It can still be repeated bit by bit, because a site's randomness follows from its
secret and its inputs: the comparison runs the same site files with copies of the secrets, in one process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Context
from safetensors.torch import load_file

from client.app import client_app
from client.check import Outcome, check_site
from client.site import Site, open_site
from conf.compose import compose_experiment
from conf.schema.site import SiteFile
from protocol.errors import SiteRefusal
from server.app import Launch, serve
from server.deployment.certificates import make_authority
from server.deployment.folder import ServerFolder
from server.events import parse_event, surviving
from simulations.in_process import InProcessGrid
from simulations.population import build_population

from .conftest import Machine, Organization, Server, free_port, make_node_key
from .forging import FORGERIES, Forger

pytestmark = [
    pytest.mark.slow,
    pytest.mark.deployment,
    pytest.mark.rare,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]

FLOWER_SUPERNODE = str(Path(sys.executable).parent / "flower-supernode")
SITES = ("eastfield", "harbor", "northgate")
LIAR = "mallory"
ROUNDS = len(FORGERIES)
KILLED_SITE_IN, KILLED_SERVER_APP_IN, KILLED_AFTER_CHECKPOINT, KILLED_SUPERLINK_IN = 1, 2, 2, 4
OVERRIDES = (
    "experiment=smoke",
    f"federation.rounds={ROUNDS}",
    "federation.local.steps=2",
    f"federation.expected_sites={len(SITES) + 1}",
    "federation.reply_timeout_s=600",
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

    def accepted(self, round_number: int) -> list[str]:
        """Whose updates a round used."""
        return sorted(self.summary["rounds"][round_number - 1]["accepted"])

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events that count: what a resumed run did again is told once."""
        told = surviving([parse_event(line) for line in (self.run / "metrics.jsonl").read_bytes().splitlines()])
        return [asdict(event) for event in told if event.kind == kind]


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
def liar(machine: Machine, server: Server, sites: dict[str, Organization]) -> Iterator[None]:
    """A registered site whose replies are forged."""
    made = Organization(machine, server, LIAR, [{"prompt": "Note:", "completion": "none"}])
    server.command("server", "register", f"{made.key}.pub")
    forger = Forger(made.state / "run" / "site.sock", LIAR)
    made.start_node()
    yield
    forger.close()


def kill_server_app(machine: Machine) -> None:
    found = machine.processes("flwr-serverapp")
    assert found, machine.logs()
    for number in found:
        os.kill(number, signal.SIGKILL)


@pytest.fixture(scope="module")
def story(machine: Machine, server: Server, sites: dict[str, Organization], liar: None) -> Story:
    keys = ",".join(f"{name}:{site.public_key}" for name, site in sites.items())
    run = server.run(*OVERRIDES, f"federation.site_keys={{{keys}}}")
    harbor, eastfield = sites["harbor"], sites["eastfield"]

    machine.wait("harbor to have reserved its first round", lambda: "reserve" in harbor.entries(), poll_s=0.005)
    harbor.kill()
    assert "commit" not in harbor.entries()
    ready = harbor.serve()

    def trains_in(round_number: int) -> Callable[[], bool]:
        return lambda: eastfield.entries().count("reserve") >= round_number

    def checkpoint(round_number: int) -> Path:
        return run / "checkpoints" / f"round-{round_number:05d}.safetensors"

    machine.wait("sites to train", trains_in(KILLED_SERVER_APP_IN), poll_s=0.005)
    kill_server_app(machine)
    assert not checkpoint(KILLED_SERVER_APP_IN).exists()
    ready()
    server.command("run", "--resume", run.name)

    machine.wait("a checkpoint", checkpoint(KILLED_AFTER_CHECKPOINT).exists, poll_s=0.005)
    kill_server_app(machine)
    assert not checkpoint(KILLED_AFTER_CHECKPOINT + 1).exists()
    server.command("run", "--resume", run.name)

    machine.wait(f"round {KILLED_SUPERLINK_IN}", trains_in(KILLED_SUPERLINK_IN), poll_s=0.02)
    (superlink,) = machine.processes("flower-superlink")
    os.kill(superlink, signal.SIGKILL)

    machine.wait("the run to end", (run / "summary.json").exists)
    machine.wait("its status", lambda: "finished:completed" in server.command("runs"))
    summary = json.loads((run / "summary.json").read_text())
    return Story(server, sites, run, summary, server.command("logs", run.name))


def test_the_run_completes(story: Story) -> None:
    assert story.summary["status"] == "finished", story.server.machine.logs()
    assert f"{ROUNDS} of {ROUNDS}" in story.server.command("runs")
    assert "SuperLink ended with code -9; it is started again" in story.server.machine.log("server")
    assert "run directory:" in story.log


def test_each_round_used_the_sites_that_could_answer(story: Story) -> None:
    assert story.accepted(KILLED_SITE_IN) == ["eastfield"]
    for later in range(KILLED_SITE_IN + 1, ROUNDS + 1):
        assert story.accepted(later) == ["eastfield", "harbor"]


def test_a_killed_server_app_is_resumed_from_its_checkpoint_and_asks_sites_for_nothing_twice(story: Story) -> None:
    assert [event["round"] for event in story.events("run_resumed")] == [
        KILLED_SERVER_APP_IN - 1,
        KILLED_AFTER_CHECKPOINT,
    ]
    assert [item["round"] for item in story.summary["rounds"]] == list(range(1, ROUNDS + 1))
    eastfield = story.sites["eastfield"]
    assert f"round {KILLED_SERVER_APP_IN} of run {story.run.name!r}: the stored reply is sent again" in (
        story.server.machine.log("eastfield-serve")
    )
    spent = [kind for kind in eastfield.entries() if kind in ("reserve", "commit")]
    assert spent == ["reserve", "commit"] * ROUNDS


def test_forged_replies_are_named_by_their_codes_and_never_used(story: Story) -> None:
    replies = [event for event in story.events("site_replied") if event["site"] == LIAR]
    assert [(event["round"], event["code"]) for event in replies] == list(
        enumerate((code for code, _ in FORGERIES), start=1)
    )
    assert not any(event["accepted"] for event in replies)


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
        spent = [statement.epsilon_run for statement in told]
        assert spent == sorted(spent)
        assert 0 < spent[-1] <= told[-1].epsilon_budget == story.sites[name].content["budget"]["epsilon"]
        assert told[-1].steps_executed == 2 * story.sites[name].entries().count("reserve")
        assert not told[-1].insecure_seed


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
    assert "4 registered, 4 online" in checked.stdout
    assert "control, runtime, /docs and /openapi.json are not forwarded" in checked.stdout


def server_check(site: Organization, **node: object) -> Outcome:
    """What a site finds of the server, with some of its `node` section replaced."""
    file = SiteFile.model_validate(site.content | {"node": site.content["node"] | node})
    return next(outcome for outcome in check_site(file, datetime.now(UTC)) if outcome.name == "server")


def test_a_sites_own_check_finds_nothing_wrong(story: Story) -> None:
    checked = story.server.machine.cloister("site", "check", "--config", str(story.sites["harbor"].config))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{story.server.address} is up, with a valid certificate" in checked.stdout
    assert "harbor answers" in checked.stdout


def test_a_sites_check_notices_another_authority(story: Story, tmp_path: Path) -> None:
    other = ServerFolder(tmp_path / "other")
    make_authority(other, "other", datetime.now(UTC))
    found = server_check(story.sites["harbor"], root_certificates=str(other.ca_certificate))
    assert (found.passed, found.name) == (False, "server")
    assert "certificate verify failed" in found.detail
    assert "certificate" in found.fix


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
        plain = HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            plain.request("GET", "/health")
            status = plain.getresponse().status
        except (OSError, HTTPException):
            continue
        assert status == 400  # nginx says so to whoever speaks plain HTTP
    ended = supernode(story.server, machine, "--insecure", "--max-retries", "1", tls=False)
    assert ended.returncode != 0


def test_a_sites_check_notices_that_the_server_is_down(story: Story, machine: Machine) -> None:
    """The last one: it takes the server down, first behind its proxy, then the proxy too."""
    harbor = story.sites["harbor"]
    machine.end("server")
    found = server_check(harbor)
    assert found.passed is False
    assert found.detail == f"{story.server.address} answers, and says 502 to /health: the server behind it is down"
    machine.end("nginx")
    checked = machine.cloister("site", "check", "--config", str(harbor.config))
    assert checked.returncode == 1, checked.stdout + checked.stderr
    (failed,) = [line for line in checked.stdout.splitlines() if "FAIL" in line]
    assert "server" in failed
    assert "Connection refused" in checked.stdout
    assert "with the server's operator" in checked.stdout


def supernode(server: Server, machine: Machine, *options: str, tls: bool = True) -> subprocess.CompletedProcess[str]:
    trust = ("--root-certificates", str(server.folder.for_sites / "ca.crt")) if tls else ()
    # Without a SuperExec, which would outlive a SuperNode that gives up.
    place = ("--superlink", server.address, "--port", str(free_port()), "--isolation", "process")
    command = (FLOWER_SUPERNODE, *place, *trust, *options)
    return subprocess.run(command, env=machine.env, capture_output=True, text=True, check=False, timeout=600)


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
    serve(grid, Launch(experiment, path, expected_sites=len(SITES), waits_forever=True))
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
