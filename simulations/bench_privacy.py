"""What privacy costs: per-example gradients, clipping and noise against the same step without them, side by side.

    python -m simulations.bench_privacy             # the CPU table, and the GPU table where there is a GPU
    python -m simulations.bench_privacy --seconds 5 # fewer steps per case: a look, in a few minutes
    python -m simulations.bench_privacy --gpu       # the GPU table alone

Each figure is a median over paired steps that take turns, so that a busy machine slows all alike. Each pads as it does
in use: the plain step to the longest record of a micro-batch, the private ones by each record's own length (decision
0016), and `one_by_one` not at all. On a CPU time is processor time of one thread; memory is the peak above the loaded
model, each mode in a process of its own, forked from one that has loaded the model. How many steps are taken follows
from `--seconds`, so that the CPU table takes about ten minutes on two cores. Nothing here is a test.

==========  ===========================================================================================
none        ordinary LoRA training: no clipping, no noise
native      `privacy.per_example`
opacus      Opacus' hooks
ghost       Opacus' ghost clipping, which no configuration reaches (`privacy.ghost_clipping`)
one_by_one  one example per backward pass
==========  ===========================================================================================
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

__all__ = [
    "CASES",
    "MODES",
    "QUICK",
    "Bench",
    "Case",
    "main",
    "measure_memory",
    "measure_time",
    "print_gpu_table",
    "print_tables",
]

MODES = ("none", "native", "opacus", "ghost", "one_by_one")
_VOCABULARY = 8000
_SECONDS = 45.0
"""Of timing per case, where nothing else is said."""
_LEAST_STEPS, _MOST_STEPS = {"native": 9}, 16
"""Of a mode; others take three at least. The one that has an aim is not left to the median of three."""


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
QUICK = CASES[:2]


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

        rule = self._rule(mode)
        try:
            began = self._now()
            for batch, owners in self._batches(mode, rule.max_micro_batch):
                losses = CausalLMObjective().losses(self.network, batch.to(self.device))
                rule.accumulate(losses, owners.to(self.device))
            rule.finish()
            return self._now() - began
        finally:
            rule.close()
            for parameter in self.trained.values():
                parameter.grad = None

    def _batches(self, mode: str, max_units: int | None) -> Iterator[tuple[Any, torch.Tensor]]:
        """Yield padded batches and the unit of each row, in micro-batches of half the step where lengths differ."""
        from finetuning.batches import collate, micro_batches
        from finetuning.units import MicroBatches

        budget = self.case.length * self.case.batch // (2 if self.case.mixed else 1)
        if mode == "none":
            for group in micro_batches([len(example) for example in self.examples], max_tokens=budget):
                yield collate([self.examples[position] for position in group], 0), torch.arange(len(group))
        else:
            maker = MicroBatches.of(self.examples, None, 0, max_tokens=budget, max_units=max_units)
            yield from ((part.batch, part.owners) for part in maker.of_step(range(len(self.examples))))

    def _rule(self, mode: str) -> Any:
        from privacy.ghost_clipping import GhostGradients
        from privacy.gradients import gradient_rule
        from privacy.randomness import SecureStream

        plan, stream = _plan(mode, self.case.batch), SecureStream.from_operating_system()
        if mode == "ghost":
            return GhostGradients(plan, self.network, self.trained, stream)
        return gradient_rule(plan, mode, self.network, self.trained, stream)

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def measure_time(bench: Bench, seconds: float, modes: Sequence[str] = MODES) -> tuple[float, dict[str, float]]:
    """Return the median seconds of the non-private step, and each mode's median ratio to the step beside it.

    A mode's steps take turns with non-private ones and with nothing else, each being first half of the time: what a
    step takes depends on what the one before has left in the caches and in the allocator.
    """
    plain: list[float] = []
    ratios: dict[str, float] = {"none": 1.0}
    for mode in [mode for mode in modes if mode != "none"]:
        warmed = time.perf_counter()
        for each in ("none", mode):
            bench.step(each)
        repeats = int(seconds / len(modes) / (time.perf_counter() - warmed))
        repeats = min(max(repeats, _LEAST_STEPS.get(mode, 3)), _MOST_STEPS)
        orders = [("none", mode) if turn % 2 else (mode, "none") for turn in range(repeats)]
        paired = [{each: bench.step(each) for each in order} for order in orders]
        ratios[mode] = median(each[mode] / each["none"] for each in paired)
        plain += [each["none"] for each in paired]
    return median(plain), ratios


def measure_memory(case: Case) -> tuple[float, dict[str, float]]:
    """Return the non-private step's peak in megabytes above the loaded model, and each mode's ratio to it."""
    peaks = _peaks_in_another_process(case)
    return peaks["none"], {mode: peaks[mode] / peaks["none"] for mode in MODES}


def print_tables(seconds: float = _SECONDS, cases: Sequence[Case] = CASES) -> None:
    """Measure and print: the CPU table, and the GPU table where there is one."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(Console().width, 130))
    table = Table(title=f"private step over plain LoRA step, {_machine()}")
    table.add_column("Llama shape, fp32")
    table.add_column("plain\ns, MB", justify="right")
    for mode in MODES[1:]:
        table.add_column(f"{mode}\ntime memory", justify="right")
    torch.set_num_threads(1)
    for case in cases:
        (plain, times), (megabytes, peaks) = measure_time(Bench(case), seconds), measure_memory(case)
        figures = [f"{times[mode]:.3f} {peaks[mode]:.3f}" for mode in MODES[1:]]
        table.add_row(case.name, f"{plain:.2f} {megabytes:.0f}", *figures)
    table.caption = "aim for native: time ≤ 1.05, memory ≤ 1.10; noise and clipping included"
    console.print(table)
    print_gpu_table(seconds)


def print_gpu_table(seconds: float = _SECONDS) -> None:
    """Measure and print the GPU table, or say that there is no GPU."""
    from rich.console import Console

    Console().print(_gpu_table(seconds) if torch.cuda.is_available() else "no GPU here: its table is left out")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or measure a case's peaks for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=_SECONDS, help=f"of timing per case (default {_SECONDS:g})")
    parser.add_argument("--quick", action="store_true", help="the smaller model at rank 8 alone")
    parser.add_argument("--gpu", action="store_true", help="the GPU table alone")
    parser.add_argument("--peaks", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peaks:
        print(json.dumps(_forked_peaks(Case(**json.loads(options.peaks)))))  # noqa: T201 - read by the parent process
    elif options.gpu:
        print_gpu_table(options.seconds)
    else:
        print_tables(options.seconds, QUICK if options.quick else CASES)


def _gpu_table(seconds: float) -> Any:
    """Return the table of a 1B-shaped model in bf16: time, memory, and the largest batch that fits."""
    from rich.table import Table

    name = torch.cuda.get_device_name()
    table = Table(title=f"1B-shaped Llama in bf16, rank 8, 8 x 512 tokens, {name}, torch {torch.__version__}")
    for heading in ("", "time", "peak memory", "largest batch"):
        table.add_column(heading, justify="right")
    case = Case(2048, 8, 8, mixed=False, length=512, layers=16, dtype="bfloat16")
    bench = Bench(case, "cuda")
    plain, times = measure_time(bench, seconds)
    peaks = {mode: _gpu_peak(bench, mode) for mode in MODES}
    for mode in MODES:
        # One by one, memory does not grow with the batch.
        largest = "any" if mode == "one_by_one" else str(_largest_batch(bench, mode))
        table.add_row(mode, f"{times[mode]:.3f}", f"{peaks[mode] / peaks['none']:.3f}", largest)
    table.caption = f"plain step: {1000 * plain:.0f} ms, {peaks['none'] / 2**30:.2f} GiB above the loaded model"
    return table


def _gpu_peak(bench: Bench, mode: str) -> float:
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    bench.step(mode)
    return float(torch.cuda.max_memory_allocated() - held)


def _largest_batch(bench: Bench, mode: str) -> int:
    """Return the largest batch that fits, to a quarter of a power of two."""
    fits = 8
    while _fits(bench, mode, 2 * fits):
        fits *= 2
    quarter = fits // 4
    for size in (fits + 3 * quarter, fits + 2 * quarter, fits + quarter):
        if _fits(bench, mode, size):
            return size
    return fits


def _fits(bench: Bench, mode: str, size: int) -> bool:
    examples, case = bench.examples, bench.case
    bench.case = replace(case, batch=size)
    bench.examples = [examples[position % len(examples)] for position in range(size)]
    try:
        bench.step(mode)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        bench.case, bench.examples = case, examples
        torch.cuda.empty_cache()


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


def _peaks_in_another_process(case: Case) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "simulations.bench_privacy", "--peaks", json.dumps(asdict(case))]
    # Each tensor gets pages of its own, or the heap's fragmentation (15 % between equal runs) would be measured.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise RuntimeError(f"measuring the memory of {case.name} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def _forked_peaks(case: Case) -> dict[str, float]:
    """Return each mode's peak in megabytes; the child that takes the steps begins with what is loaded here."""
    torch.set_num_threads(1)
    bench = Bench(case)
    peaks: dict[str, float] = {}
    for mode in MODES:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, repr(_peak_megabytes(bench, mode)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            peaks[mode] = float(answer.read() or "nan")
        os.waitpid(child, 0)
    return peaks


def _peak_megabytes(bench: Bench, mode: str) -> float:
    """Return the peak of two steps in this process, less what the loaded model takes."""
    loaded = _status_megabytes("VmRSS")
    for _ in range(2):
        bench.step(mode)
    return _status_megabytes("VmHWM") - loaded


def _status_megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _machine() -> str:
    """Return the processor's name, its cores, and torch's version."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, one of {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    main()
