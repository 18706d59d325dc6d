"""The figures of the README, measured side by side on this machine: `make bench`.

Nothing here is a test and nothing fails on a slow machine; the table says what was measured and what was aimed for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["Figure", "main", "measure_all", "print_figures"]

_BASE = (
    "privacy.insecure_seed=1",
    "evaluation.every=0",
    "data.partition={kind:iid,sites:SITES}",
    "logging.progress=none",
)
_ROUNDS = ("federation.rounds=10", "federation.local.steps=4", "federation.local.expected_batch_size=32")
_SMALL = ("federation.rounds=2", "federation.local.steps=1", "federation.local.expected_batch_size=16")


@dataclass(frozen=True)
class Figure:
    """One measured figure, its unit, and what was aimed for."""

    name: str
    value: float
    unit: str
    aim: str


def measure_all(quick: bool) -> list[Figure]:
    """Return every figure; `quick` takes two rounds instead of ten and leaves Ray out."""
    rounds = _SMALL if quick else _ROUNDS
    local = _measured("in_process", 8, rounds)
    figures = [
        Figure(
            "in-process simulation over local training, rounds", local["rounds_s"] / local["train_s"], "x", "≤ 1.10"
        ),
        Figure("the same with loading, checks and calibration", local["wall_s"] / local["train_s"], "x", ""),
        Figure("local training, 8 sites", local["train_s"], "s", ""),
    ]
    if not quick:
        ray = _measured("ray", 8, rounds)
        figures.append(
            Figure("Flower's Ray runtime over in-process, wall", ray["wall_s"] / local["wall_s"], "x", "> 1")
        )
    few, many = _measured("in_process", 4, _SMALL), _measured("in_process", 64, _SMALL)
    figures += [
        Figure("peak memory, 64 sites over 4", many["peak_mb"] / few["peak_mb"], "x", "≤ 1.2"),
        Figure("peak memory, 64 sites", many["peak_mb"], "MB", ""),
        Figure("cloister --help", _help_seconds(), "s", "< 0.5"),
    ]
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, no Ray, one small model")
    parser.add_argument(
        "--deployment",
        action="store_true",
        help="also a deployment on loopback, and faults injected into one: some ten minutes",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", nargs=2, metavar=("RUNTIME", "SITES"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        runtime, sites = options.measure
        print(json.dumps(_simulated(runtime, int(sites), options.overrides)))  # noqa: T201 - read by the parent process
        return
    figures = measure_all(options.quick)
    print_figures(figures, "simulation and program")
    from simulations.bench_codecs import print_table
    from simulations.bench_privacy import CASES, QUICK, print_tables

    print_tables(cases=QUICK if options.quick else CASES)
    print_table(options.quick)
    from simulations.bench_aggregation import print_aggregation_table

    if options.quick:
        print_aggregation_table(20, 1_000_000)
    else:
        print_aggregation_table()
    if options.deployment:
        from simulations.bench_deployment import main as print_deployment

        print_deployment([])
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1, ensure_ascii=False))


def _measured(runtime: str, sites: int, overrides: Sequence[str]) -> dict[str, float]:
    """Run one simulation in a process of its own, so that peak memory is its own too."""
    command = [sys.executable, "-W", "ignore", "-m", "simulations.bench", "--measure", runtime, str(sites), "--"]
    result = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the {runtime} simulation of {sites} sites failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def _simulated(runtime: str, sites: int, overrides: Sequence[str]) -> dict[str, float]:
    from conf.compose import compose_experiment
    from simulations.simulate import simulate

    base = [override.replace("SITES", str(sites)) for override in _BASE]
    experiment = compose_experiment([*base, f"runtime={runtime}", *overrides])
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        run = simulate(experiment, Path(folder) / "run")
        wall_s = time.perf_counter() - began
        lines = [
            line for path in (run.path / "sites").glob("*/diagnostics.jsonl") for line in path.read_text().splitlines()
        ]
    return {
        "wall_s": wall_s,
        "rounds_s": run.summary["seconds"]["total"],
        "train_s": sum(json.loads(line)["seconds"] for line in lines),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _help_seconds() -> float:
    """Return the best of five: what the program takes, not what else the machine was doing."""
    command = [str(Path(sys.executable).parent / "cloister"), "--help"]
    times: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    return min(times)


def print_figures(figures: Sequence[Figure], title: str) -> None:
    """Print figures as a table that says on what they were measured."""
    from rich.console import Console
    from rich.table import Table

    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    table = Table(title=f"{title}; measured on {machine}")
    for heading in ("figure", "measured", "aim"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in figures:
        table.add_row(figure.name, f"{figure.value:.3g} {figure.unit}", figure.aim)
    Console().print(table)


if __name__ == "__main__":
    main()
