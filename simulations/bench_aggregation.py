"""What the server's aggregation costs: every linear strategy against a copy of the same bytes, and against Flower.

    python -m simulations.bench_aggregation             # 100 sites of 10 M values each
    python -m simulations.bench_aggregation --quick     # 20 sites of 1 M values

Each strategy gets a process of its own, in which folds and copies of the same update take turns: one thread, processor
time. Updates are a few buffers in turn, larger together than the cache. Memory is the peak above what was loaded, at a
tenth of the sites and at all of them. Flower's FedAvg wants all replies in a list, so it gets fewer of them; it is
given the same updates as serialized arrays, as it would receive them, and reading those is part of its time. Nothing
here is a test.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

__all__ = ["linear_strategies", "main", "measure", "measure_flower", "print_aggregation_table"]

_WIDTH, _RANK, _CORE = 4096, 16, 256
_BUFFERS = 3
_FLOWER = "flower"
_PLAIN = "mean"
"""The weighted mean alone, without what `fedit` measures beside it."""
_REPLIES = 10
"""What Flower is given: each reply is 40 MB, and twice that while it works."""


def linear_strategies() -> list[str]:
    """Return the names of the strategies whose combined update is a weighted sum."""
    from conf.compose import CONFIG_DIRECTORY

    names = sorted(path.stem for path in (CONFIG_DIRECTORY / "strategy").glob("*.yaml"))
    return [name for name in names if _built(name).is_linear]


def measure(name: str, clients: int, values: int) -> dict[str, float]:
    """Return a strategy's figures.

    Args:
        name: of the strategy, or `mean`: the weighted mean alone.
        clients: how many updates are folded.
        values: of one update.

    Returns:
        seconds and copy_seconds: for all updates, and for a copy of as many bytes; peak_mb: above what was loaded.
    """
    from strategies.averaging import Averaging
    from strategies.base import Contribution

    built = "fedit" if name == _PLAIN else name
    server = Averaging() if name == _PLAIN else _built(name).server
    adapter = _adapter(built, values)
    updates = [_random(_uploaded(built, adapter), seed) for seed in range(_BUFFERS)]
    target = {tensor_name: torch.empty_like(tensor) for tensor_name, tensor in updates[0].items()}
    for tensor in target.values():
        tensor.fill_(1)  # a page that was never written is no memory yet
    state = server.init(adapter)
    loaded = _megabytes("VmRSS")
    aggregator = server.aggregator(adapter, state)
    folds: list[float] = []
    copies: list[float] = []
    for client in range(clients):
        contribution = Contribution(updates[client % _BUFFERS], 1.0 + client % 7, adapter)
        folds.append(_seconds(lambda given=contribution: aggregator.accumulate(given)))
        copies.append(_seconds(lambda given=contribution: _copy(target, given.update)))
    last = _seconds(aggregator.result)
    peak = _megabytes("VmHWM") - loaded
    # The median: what one fold takes, not what else the machine did meanwhile.
    return {
        "seconds": median(folds) * clients + last,
        "copy_seconds": median(copies) * clients,
        "megabytes": 4e-6 * clients * sum(tensor.numel() for tensor in updates[0].values()),
        "peak_mb": peak,
    }


def measure_flower(clients: int, values: int) -> dict[str, float]:
    """Return the figures of Flower's FedAvg over a list of `clients` replies, as `measure` does."""
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    adapter = _adapter("fedit", values)
    updates = [_random(adapter, seed) for seed in range(_BUFFERS)]
    target = _random(adapter, 0)
    replies = [_reply(node, updates[node % _BUFFERS]) for node in range(1, clients + 1)]
    loaded = _megabytes("VmRSS")
    copied = median(_seconds(lambda: _copy(target, updates[0])) for _ in range(clients))
    began = time.process_time()
    arrays, _ = FedAvg().aggregate_train(1, replies)
    seconds = time.process_time() - began
    if arrays is None:
        raise RuntimeError("Flower's FedAvg refused the replies")
    return {
        "seconds": seconds,
        "copy_seconds": copied * clients,
        "megabytes": 4e-6 * clients * sum(tensor.numel() for tensor in adapter.values()),
        "peak_mb": _megabytes("VmHWM") - loaded,
    }


def print_aggregation_table(clients: int = 100, values: int = 10_000_000) -> None:
    """Measure and print."""
    from rich.console import Console
    from rich.table import Table

    few = max(clients // 10, 1)
    table = Table(title=f"aggregation of {clients} updates of {values / 1e6:g} M values, one thread")
    for heading in ("", "MB", "s", "GB/s", "share of a copy", f"peak MB, {few} sites", f"peak MB, {clients} sites"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in linear_strategies():
        all_of_them, some = _measured(name, clients, values), _measured(name, few, values)
        table.add_row(name, *_columns(all_of_them), f"{some['peak_mb']:.0f}", f"{all_of_them['peak_mb']:.0f}")
    replies = min(_REPLIES, clients)
    flower = _measured(_FLOWER, replies, values)
    table.add_row(f"Flower's FedAvg, {replies} replies", *_columns(flower), f"{flower['peak_mb']:.0f}", "–")
    plain = _measured(_PLAIN, replies, values)
    table.add_row(f"the weighted mean alone, {replies} updates", *_columns(plain), f"{plain['peak_mb']:.0f}", "–")
    table.caption = (
        "fedit and fedrot also measure their drift. Flower's replies, 40 MB each at 10 M values, are held before and "
        "are not in its peak"
    )
    Console(width=max(Console().width, 130)).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or measure one line of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 sites of 1 M values")
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "CLIENTS", "VALUES"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        torch.set_num_threads(1)
        name, clients, values = options.measure[0], int(options.measure[1]), int(options.measure[2])
        figures = measure_flower(clients, values) if name == _FLOWER else measure(name, clients, values)
        print(json.dumps(figures))  # noqa: T201 - read by the parent process
    elif options.quick:
        print_aggregation_table(20, 1_000_000)
    else:
        print_aggregation_table()


def _columns(figures: dict[str, float]) -> list[str]:
    return [
        f"{figures['megabytes']:.0f}",
        f"{figures['seconds']:.2f}",
        f"{figures['megabytes'] / 1000 / figures['seconds']:.1f}",
        f"{figures['copy_seconds'] / figures['seconds']:.0%}",
    ]


def _measured(name: str, clients: int, values: int) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "simulations.bench_aggregation", "--measure", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(clients), str(values)], capture_output=True, text=True, check=False, env=environment
    )
    if result.returncode:
        raise RuntimeError(f"measuring {name} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def _built(name: str) -> Any:
    from conf.compose import compose_experiment
    from strategies.build import build_strategy

    return build_strategy(compose_experiment([f"strategy={name}", "privacy=none"]).strategy)


def _adapter(name: str, values: int) -> dict[str, torch.Tensor]:
    """Return an adapter of which about `values` values travel: factors of rank 16, or square cores alone."""
    layer = {"lora_A.weight": (_RANK, _WIDTH), "lora_B.weight": (_WIDTH, _RANK)}
    if not _uploaded(name, {key: torch.empty(0) for key in layer}):
        layer = {"lora_core": (1, _CORE, _CORE)}
    sent = _uploaded(name, {key: torch.empty(shape) for key, shape in layer.items()})
    layers = max(round(values / sum(tensor.numel() for tensor in sent.values())), 1)
    shapes = {f"base.layers.{index}.proj.{key}": shape for index in range(layers) for key, shape in layer.items()}
    return _random({key: torch.empty(shape) for key, shape in shapes.items()}, _BUFFERS)


def _uploaded(name: str, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    strategy = _built(name)
    names = strategy.uploaded(strategy.trained(frozenset(adapter), 1), 1)
    return {key: adapter[key] for key in adapter if key in names}


def _random(like: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in like.items()}


def _reply(node: int, update: dict[str, torch.Tensor]) -> Any:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

    asked = Message(RecordDict({"config": ConfigRecord({})}), node, MessageType.TRAIN)
    asked.metadata.__dict__["_message_id"] = f"message-{node}"  # what Flower's runtime sets when it sends
    arrays = ArrayRecord(OrderedDict((name, Array(tensor.numpy())) for name, tensor in update.items()))
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": node})}), reply_to=asked)


def _copy(target: dict[str, torch.Tensor], source: Any) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


def _seconds(work: Any) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
