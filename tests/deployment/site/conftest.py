"""A site's own process, as an operator starts it: `cloister site serve`, a site file, a socket."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.relay import relay
from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from finetuning.adapters import attach
from finetuning.models import load_base
from privacy.ledger.chain import Entry
from privacy.ledger.store import Store
from protocol.errors import PrivacyError
from protocol.instructions import Instruction, InstructionHeader, Reply, client_plan
from protocol.records import instruction_to_record, record_to_reply
from protocol.tensors import digest
from simulations.population import build_population
from strategies.build import build_strategy

CLOISTER = (sys.executable, "-c", "from cli.main import main; main()")
SMALL = (
    "experiment=smoke",
    "federation.local.expected_batch_size=6",
    "federation.local.steps=2",
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=1.0",
)
POLICY = {"require_approval": False}
HANGS_S = 600
"""What is not there by then never comes: a stop for what hangs, and no measure of speed."""


class SiteProcess:
    """One site file and the processes that serve it, one after the other."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        self.folder, self.state = folder, folder / "s"
        self.config = folder / "site.yaml"
        self.logs: list[Path] = []
        self.socket = self.state / "run" / "site.sock"
        records = folder / "records.jsonl"
        records.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.process: subprocess.Popen[bytes] | None = None
        self.write(
            {
                "name": "harbor",
                "published_records": len(rows),
                "model_path": "embedded:clinic-base",
                "data": {"source": {"path": str(records)}, "columns": {"kind": "prompt_completion"}},
                "budget": {"epsilon": 50.0, "delta": 1e-3},
                "policy": POLICY,
                "runtime": {"threads": 1, "device": "cpu"},
                "serve": {"stop_grace_s": 20.0},
                "state_directory": str(self.state),
            }
        )

    def write(self, content: dict[str, Any]) -> None:
        self.content = content
        self.config.write_text(yaml.safe_dump(content))

    def change(self, **sections: Any) -> None:
        self.write(self.content | sections)

    def start(self, *prefix: str) -> "SiteProcess":
        self.logs.append(self.folder / f"log{len(self.logs)}")
        began = time.monotonic()
        with self.logs[-1].open("wb") as log:
            command = (*prefix, *CLOISTER, "site", "serve", "--config", str(self.config))
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        while "listens at" not in self.text():
            if self.process.poll() is not None or time.monotonic() > began + HANGS_S:
                pytest.fail(f"the site did not come up\n{self.text()}")
            time.sleep(0.05)
        return self

    def text(self) -> str:
        """What the latest process wrote."""
        return self.logs[-1].read_text()

    def ask(self, instruction: Instruction) -> Reply:
        return record_to_reply(relay(self.socket, "train", instruction_to_record(instruction)))

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(HANGS_S)

    def entries(self) -> tuple[Entry, ...]:
        """The ledger's entries, read as anybody can."""
        path = self.state / "ledger.db"
        if not path.exists():
            return ()
        store = Store(path, read_only=True)
        try:
            return store.snapshot().entries
        finally:
            store.close()

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.entries() if entry.kind in ("reserve", "commit")]

    def wait_for(self, kinds: list[str]) -> None:
        """Wait until the ledger holds these entries, and no more."""
        began, found = time.monotonic(), None
        while found != kinds and time.monotonic() < began + HANGS_S:
            with suppress(PrivacyError):  # it is being made
                found = self.kinds()
            if found is not None and (len(found) > len(kinds) or (self.process and self.process.poll() is not None)):
                break  # it went past them, or ended
            time.sleep(0.005)
        assert found == kinds, self.text()


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    return [dict(row) for row in build_population(compose_experiment(SMALL)).parts["harbor"][:60]]


@pytest.fixture
def make_site(tmp_path: Path, rows: list[dict[str, Any]]) -> Iterator[Callable[..., SiteProcess]]:
    made: list[SiteProcess] = []

    def make(**sections: Any) -> SiteProcess:
        folder = tmp_path / f"site{len(made)}"
        folder.mkdir()
        made.append(SiteProcess(folder, rows))
        made[-1].change(**sections)
        return made[-1]

    yield make
    for site in made:
        if site.process is not None and site.process.poll() is None:
            site.process.kill()
            site.process.wait()


@pytest.fixture(scope="session")
def instruct() -> Callable[..., Instruction]:
    def make(*overrides: str, round_number: int = 1, run: str = "run", nudge: float = 0.0) -> Instruction:
        experiment: Experiment = compose_experiment([*SMALL, *overrides])
        adapted = attach(load_base(experiment.model, experiment.task, "cpu"), experiment.peft, experiment.task)
        start = dict(adapted.initial(experiment.seed))
        trained = build_strategy(experiment.strategy).trained(frozenset(start), 1)
        for name in trained:
            start[name] = start[name] + nudge
        plan = client_plan(experiment, run)
        header = InstructionHeader(
            round=round_number,
            plan=plan,
            plan_digest=plan.digest,
            base_digest=adapted.base.digest,
            adapter_digest=digest(start),
        )
        return Instruction(header, {name: start[name] for name in trained})

    return make
