"""What privacy costs: per-example gradients, clipping and noise against the same step without them, side by side.

Each figure is a median over paired steps that take turns, so that a busy machine slows both alike. Both see the same
padded batches. On a CPU time is processor time of one thread; memory is the peak above the loaded model, each mode in a
process of its own. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

__all__ = ["MODES", "Bench", "Case", "main", "measure_memory", "measure_time", "print_tables"]

MODES = ("none", "native", "opacus", "one_by_one")
_ON_A_GPU = MODES[:3]
_VOCABULARY = 8000


@dataclass(frozen=True)
class Case:
    """A Llama-shaped model of random weights, its adapter and its batch."""

    hidden: int
    rank: int
    batch: int
    mixed: bool
    """Lengths from 16 to `length` in micro-batches, else all of `length`."""
    length: int = 128
    layers: int = 4
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The case in words."""
        lengths = f"16 to {self.length}" if self.mixed else str(self.length)
        return f"hidden {self.hidden}, rank {self.rank}, {self.batch} x {lengths} tokens"


CASES = tuple(
    Case(hidden, rank, batch, mixed)
    for hidden, batch in ((256, 16), (768, 8))
    for rank in (8, 16)
    for mixed in (False, True)
)


class Bench:
    """One model and one batch; `step` takes one training step's gradient in a mode."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        import numpy as np

        from finetuning.batches import Example

        self.case, self.device = case, torch.device(device)
        self.network = _network(case).to(self.device).train()
        self.trained = {name: each for name, each in self.network.named_parameters() if each.requires_grad}
        generator = np.random.default_rng(0)
        lengths = generator.integers(16, case.length + 1, case.batch) if case.mixed else [case.length] * case.batch
        self.examples = [
            Example(generator.integers(1, _VOCABULARY, size).astype(np.int32), np.ones(size, dtype=np.bool_))
            for size in lengths
        ]

    def step(self, mode: str) -> float:
        """Take a step's gradient, and return its seconds."""
        from finetuning.tasks.causal_lm import CausalLMObjective
        from finetuning.units import MicroBatches
        from privacy.gradients import gradient_rule
        from privacy.randomness import SecureStream

        stream = SecureStream.from_operating_system()
        rule = gradient_rule(_plan(mode, self.case.batch), mode, self.network, self.trained, stream)
        budget = self.case.length * self.case.batch // (2 if self.case.mixed else 1)
        maker = MicroBatches.of(self.examples, None, 0, max_tokens=budget, max_units=rule.max_micro_batch)
        try:
            began = self._now()
            for part in maker.of_step(range(len(self.examples))):
                part = part.to(self.device)
                losses = CausalLMObjective().losses(self.network, part.batch)
                rule.accumulate(losses, part.owners)
            rule.finish()
            return self._now() - began
        finally:
            rule.close()
            for parameter in self.trained.values():
                parameter.grad = None

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def measure_time(bench: Bench, repeats: int, modes: Sequence[str] = MODES) -> dict[str, float]:
    """Return each private mode's median ratio of step time to the non-private step beside it."""
    for mode in modes:
        bench.step(mode)
    paired = [{mode: bench.step(mode) for mode in modes} for _ in range(repeats)]
    return {mode: median(each[mode] / each["none"] for each in paired) for mode in modes if mode != "none"}


def measure_memory(case: Case) -> dict[str, float]:
    """Return each private mode's peak memory above the loaded model, over the non-private step's."""
    peaks = {mode: _peak_in_its_own_process(case, mode) for mode in MODES}
    return {mode: peak / peaks["none"] for mode, peak in peaks.items() if mode != "none"}


def print_tables(quick: bool) -> None:
    """Measure and print; `quick` takes the smaller model and three steps each."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"private step over non-private step, {_machine()}")
    table.add_column("Llama-shaped model, 4 layers, fp32")
    for heading in ("native", "opacus", "one by one"):
        table.add_column(f"{heading}\ntime", justify="right")
        table.add_column("memory", justify="right")
    torch.set_num_threads(1)
    for case in CASES:
        if quick and (case.hidden > 256 or case.rank > 8):
            continue
        times, peaks = measure_time(Bench(case), 3 if quick else 9), measure_memory(case)
        table.add_row(case.name, *(f"{of[mode]:.3f}" for mode in MODES[1:] for of in (times, peaks)))
    table.caption = "aim for native: time ≤ 1.05, memory ≤ 1.10; noise and clipping included"
    Console().print(table)
    if torch.cuda.is_available():
        Console().print(_gpu_table(3 if quick else 15))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or measure one peak for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smaller model, three steps each")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        case, mode = options.peak
        print(_peak_megabytes(Case(**json.loads(case)), mode))  # noqa: T201 - read by the parent process
        return
    print_tables(options.quick)


def _gpu_table(repeats: int) -> Any:
    """Return the table of a 1B-shaped model in bf16: time, memory, and the largest batch that fits."""
    from rich.table import Table

    table = Table(title=f"1B-shaped Llama in bf16, rank 8, 512 tokens, {torch.cuda.get_device_name()}")
    for heading in ("", "time", "memory", "largest batch"):
        table.add_column(heading, justify="right")
    case = Case(2048, 8, 8, mixed=False, length=512, layers=16, dtype="bfloat16")
    bench = Bench(case, "cuda")
    times, peaks = measure_time(bench, repeats, _ON_A_GPU), {mode: _gpu_peak(bench, mode) for mode in _ON_A_GPU}
    for mode in _ON_A_GPU:
        ratio = peaks[mode] / peaks["none"]
        table.add_row(mode, f"{times.get(mode, 1.0):.3f}", f"{ratio:.3f}", str(_largest_batch(bench, mode)))
    return table


def _gpu_peak(bench: Bench, mode: str) -> float:
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    bench.step(mode)
    return float(torch.cuda.max_memory_allocated() - held)


def _largest_batch(bench: Bench, mode: str) -> int:
    """Return the largest power of two that fits."""
    examples, case, fits = bench.examples, bench.case, 0
    try:
        for doubling in range(3, 16):
            size = 2**doubling
            bench.case = Case(**asdict(case) | {"batch": size})
            bench.examples = [examples[position % len(examples)] for position in range(size)]
            bench.step(mode)
            fits = size
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
    finally:
        bench.case, bench.examples = case, examples
    return fits


def _network(case: Case) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 11 // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=max(case.hidden // 256, 1),
        max_position_embeddings=2 * case.length,
    )
    base = LlamaForCausalLM(config).to(getattr(torch, case.dtype))
    lora = LoraConfig(r=case.rank, lora_alpha=16, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    return get_peft_model(base, lora)


def _plan(mode: str, batch: int) -> Any:
    from conf.schema.federation import LocalTraining
    from conf.schema.privacy import ExampleLevel, NoPrivacy
    from privacy.plan import build_plan

    privacy = NoPrivacy() if mode == "none" else ExampleLevel(noise_multiplier=1.0)
    local = LocalTraining(steps=1, expected_batch_size=batch)
    return build_plan(privacy, local, rounds=1, published_units=10 * batch, num_units=10 * batch)


def _peak_in_its_own_process(case: Case, mode: str) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "simulations.bench_privacy", "--peak"]
    # Each tensor gets pages of its own, or the heap's fragmentation (15 % between equal runs) would be measured.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    arguments = [json.dumps(asdict(case)), mode]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise RuntimeError(f"the {mode} step of {case.name} failed:\n{result.stderr[-3000:]}")
    return float(result.stdout.splitlines()[-1])


def _peak_megabytes(case: Case, mode: str) -> float:
    """Return the peak of two steps in this process, less what the loaded model takes."""
    torch.set_num_threads(1)
    bench = Bench(case)
    loaded = _status_megabytes("VmRSS")
    for _ in range(2):
        bench.step(mode)
    return _status_megabytes("VmHWM") - loaded


def _status_megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _machine() -> str:
    return f"{platform.machine()}, one of {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    main()
