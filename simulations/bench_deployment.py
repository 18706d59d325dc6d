"""What a deployment costs beside its training, on loopback: `make bench OPTIONS=--deployment`.

The same messages go through the same SuperLink twice: to a ClientApp that returns them, which is Flower's own floor,
and to a site's process that answers from its stored replies: everything that Cloister does in a round but training and
booking. No TLS and no proxy: they cost both the same. Nothing here is a test; faults are injected by the tests of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import yaml
from flwr.app import Array, ArrayRecord, RecordDict

from client.bundles import BUNDLES_FILE, allow_bundle, bundle_digest
from client.relay import relay
from conf.compose import compose_experiment
from finetuning.adapters import attach
from finetuning.models import load_base
from protocol.frames import encode_frame
from protocol.instructions import Instruction, InstructionHeader, client_plan
from protocol.records import instruction_to_record, record_to_reply
from protocol.tensors import digest
from server.events import Event, RoundFinished, RoundStarted
from simulations.bench import Figure, print_figures
from simulations.bench_processes import Processes, free_port
from simulations.faults import inject, print_faults
from simulations.population import build_population
from simulations.simulate import simulate
from strategies.build import build_strategy

__all__ = ["main", "measure_all"]

_OVERRIDES = (
    "experiment=smoke",
    "federation.rounds=3",
    "federation.local.steps=1",
    "federation.local.expected_batch_size=6",
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=1.0",
    "evaluation.every=0",
    "logging.progress=none",
)
_REPEAT, _REST_S, _ARRAYS = 4, 5.0, 56
_IMPORTS = """
import time, simulations.bench_apps, flwr.supernode.cli.flwr_clientapp, flwr.supernode.runtime.run_clientapp
began = time.perf_counter()
import client.app, client.shim
print(time.perf_counter() - began)
"""


def measure_all(folder: Path) -> list[Figure]:
    """Return every figure; `folder` is used and left."""
    with Processes(folder) as processes:
        site, figures = _site(processes)
        floor, apart = _rounds(processes, "echo_app", [site, _apart(folder, site)] * _REPEAT, None)
        whole, _ = _rounds(processes, "client.app:app", [site] * _REPEAT, folder / "site.yaml")
    ours_at_site, imports, warm = figures.pop().value, _import_seconds(), figures[2].value
    server, checkpoint, resume = _server(folder)
    beside = imports + server + checkpoint
    return [
        Figure("a round of one message, Flower's floor: a ClientApp that returns it", floor, "s", ""),
        Figure(f"the same bytes as {_ARRAYS} arrays", apart, "s", ""),
        Figure("the same round through relay and site process, without training", whole, "s", ""),
        Figure("difference, as noisy as both", whole - floor, "s", "< 0.5"),
        Figure("ours, added up from its parts", ours_at_site + beside, "s", "< 0.5"),
        Figure("ours with ledger, and with one step of training: an upper bound", warm + beside, "s", "< 0.5"),
        Figure("  relay, socket, checks and stored reply at the site", ours_at_site, "s", ""),
        Figure("  imports of relay and shim, best of three", imports, "s", ""),
        Figure("  instructions, replies and ledger at the server", server, "s", ""),
        Figure("  checkpoint at the server", checkpoint, "s", ""),
        *figures,
        Figure("resume of a run: data, checks, model, checkpoint, to the next round", resume, "s", ""),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures, then inject every fault of the table and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interrupt", type=Path, metavar="RUN", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.interrupt:
        _interrupted(options.interrupt)
        return
    with TemporaryDirectory(prefix="bench") as folder:
        load = os.getloadavg()[0]
        figures = measure_all(Path(folder))
    print_figures(figures, f"deployment on loopback, load {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")
    print_faults(inject())


def _site(processes: Processes) -> tuple[Path, list[Figure]]:
    """Start a site's process, time it, and return the frame of an answered instruction and the figures.

    The last figure is how long a stored reply takes.
    """
    folder = processes.folder
    experiment = compose_experiment(_OVERRIDES)
    rows = [dict(row) for row in build_population(experiment).parts["harbor"][:60]]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "name": "harbor",
        "published_records": len(rows),
        "model_path": "embedded:clinic-base",
        "data": {"source": {"path": str(folder / "records.jsonl")}, "columns": {"kind": "prompt_completion"}},
        "budget": {"epsilon": 50.0, "delta": 1e-3},
        "policy": {"require_approval": False},
        "runtime": {"threads": 1, "device": "cpu"},
        "state_directory": str(folder / "s"),
        "node": {"superlink": processes.superlink, "insecure": True, "port": free_port()},
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(content))
    began = time.perf_counter()
    serving = processes.start("serve", "cloister", "site", "serve", "--config", str(folder / "site.yaml"))
    processes.wait_for("serve", "listens at")
    start_s = time.perf_counter() - began
    socket = folder / "s" / "run" / "site.sock"
    asked = [instruction_to_record(each) for each in _instructions()]
    cold, *warm = [_seconds(socket, each) for each in asked]
    memory, cpu = _at_rest(serving.pid)
    stored = statistics.median(_seconds(socket, asked[-1]) for _ in range(_REPEAT))
    frame = folder / "instruction.frame"
    frame.write_bytes(encode_frame("train", asked[-1]))
    return frame, [
        Figure("a site's process, from its start until it listens", start_s, "s", ""),
        Figure("first round of one step after that, cold", cold, "s", ""),
        Figure("later rounds of one step, warm", statistics.median(warm), "s", ""),
        Figure("memory of a site's process at rest", memory, "MB", ""),
        Figure("processor time of a site's process at rest", cpu * 100, "% of a core", ""),
        Figure("stored reply", stored, "s", ""),
    ]


def _instructions() -> list[Instruction]:
    """Return the instructions of three rounds."""
    experiment = compose_experiment(_OVERRIDES)
    adapted = attach(load_base(experiment.model, experiment.task, "cpu"), experiment.peft, experiment.task)
    start = dict(adapted.initial(experiment.seed))
    trained = build_strategy(experiment.strategy).trained(frozenset(start), 1)
    plan = client_plan(experiment, "bench")
    first = InstructionHeader(
        round=1, plan=plan, plan_digest=plan.digest, base_digest=adapted.base.digest, adapter_digest=digest(start)
    )
    tensors = {name: start[name] for name in trained}
    return [Instruction(first.model_copy(update={"round": number}), tensors) for number in (1, 2, 3)]


def _seconds(socket: Path, asked: RecordDict) -> float:
    began = time.perf_counter()
    header = record_to_reply(relay(socket, "train", asked)).header
    took = time.perf_counter() - began
    if header.status != "trained":
        raise RuntimeError(f"the site refused with {header.code}")
    return took


def _at_rest(process: int) -> tuple[float, float]:
    """Return MB of memory and cores in use."""

    def ticks() -> int:
        return sum(map(int, Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))

    before = ticks()
    time.sleep(_REST_S)
    used = (ticks() - before) / os.sysconf("SC_CLK_TCK")
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (resident,) = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
    return resident * 1024 / 1e6, used / _REST_S


def _apart(folder: Path, frame: Path) -> Path:
    """Return a frame of about as many bytes in several arrays."""
    size = frame.stat().st_size // (4 * _ARRAYS)
    arrays = OrderedDict((f"{n}", Array(np.full(size, n, dtype=np.float32))) for n in range(_ARRAYS))
    made = folder / f"apart-{frame.name}"
    made.write_bytes(encode_frame("train", RecordDict({"tensors": ArrayRecord(arrays)})))
    return made


def _rounds(processes: Processes, app: str, frames: Sequence[Path], site: Path | None) -> tuple[float, float]:
    """Return the median seconds of the messages to a node: of those like the first, and of the others."""
    project = processes.folder / f"cloister-bench-{'site' if site else 'floor'}"
    client = app if site else f"simulations.bench_apps:{app}"
    bundle = processes.bundle(project, "simulations.bench_apps:server_app", client, ("frames", "out"))
    if site is None:
        node = processes.start_supernode()
    else:
        allow_bundle(processes.folder / "s" / BUNDLES_FILE, bundle_digest(bundle), "the bench")
        node = processes.start("site-node", "cloister", "site", "start", "--config", str(site))
    out = project.with_suffix(".json")
    processes.run(project, {"frames": json.dumps([str(path) for path in frames]), "out": str(out)})
    took = json.loads(processes.wait_for_file(out).read_text())
    processes.end(node)
    seconds = [each["whole_s"] for each in took]
    like = [took for took, path in zip(seconds, frames, strict=True) if path == frames[0]]
    others = [took for took, path in zip(seconds, frames, strict=True) if path != frames[0]]
    return statistics.median(like), statistics.median(others) if others else float("nan")


def _import_seconds() -> float:
    command = [sys.executable, "-c", _IMPORTS]
    return min(float(subprocess.run(command, capture_output=True, check=True, text=True).stdout) for _ in range(3))


def _interrupted(path: Path) -> None:
    """Run an experiment and end without a word when its second round begins."""

    def die(event: Event) -> None:
        if isinstance(event, RoundStarted) and event.round == 2:
            os._exit(9)

    simulate(compose_experiment(_OVERRIDES), path, (die,))


def _server(folder: Path) -> tuple[float, float, float]:
    """Return the seconds of the server's own work in a round, of its checkpoint, and of a resume."""
    path = folder / "run"
    command = [sys.executable, "-W", "ignore", "-m", "simulations.bench_deployment", "--interrupt", str(path)]
    subprocess.run(command, capture_output=True, check=False)
    moments: list[tuple[float, Event]] = []
    began = time.perf_counter()
    simulate(
        compose_experiment(_OVERRIDES),
        path,
        (lambda event: moments.append((time.perf_counter(), event)),),
        resume=True,
    )
    started = {event.round: at for at, event in moments if isinstance(event, RoundStarted)}
    finished = {event.round: (at, event) for at, event in moments if isinstance(event, RoundFinished)}
    at, event = finished[2]
    ours = (event.other_s or 0.0) + (event.aggregate_s or 0.0)  # withheld of secret cohorts alone
    return ours, started[3] - at, started[2] - began


if __name__ == "__main__":
    main()
