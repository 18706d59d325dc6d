"""The memory that a rank is chosen for: the formula against the real adapter, and against what training takes."""

import json
import os
import subprocess
import sys

import pytest

from conf.schema.model import LoRA, Model
from conf.schema.task import CausalLM, Classification
from finetuning.adapters import attach
from finetuning.memory import LEAST_EXAMPLES, examples_that_fit, rank_that_fits, training_bytes
from finetuning.models import load_base
from protocol.errors import ModelError

BASE = "embedded:clinic-base"
MEASURE = """
import json, sys
from pathlib import Path
from client.site import Site
from conf.compose import compose_experiment
from finetuning.adapters import attach
from finetuning.models import load_base
from protocol.instructions import Instruction, InstructionHeader, client_plan
from protocol.tensors import digest
from simulations.population import build_population, site_file

SETTINGS = ("experiment=smoke", "strategy=fedit", "privacy.insecure_seed=1", "runtime.threads=1", "evaluation.every=0",
    "federation.local.steps=2", "federation.local.expected_batch_size=64", "federation.local.optimizer.kind=adamw",
    "data.max_length=64", "data.max_records=400", "peft.targets=auto")


def megabytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def work(rank, tokens, memory_mib, state):
    experiment = compose_experiment([*SETTINGS, f"peft.rank={rank}", f"runtime.micro_batch_tokens={tokens}"])
    rows = build_population(experiment).parts["harbor"]
    file = site_file(experiment, "harbor", len(rows), Path(sys.argv[1]) / state)
    site = Site(file.model_copy(update={"memory_mib": memory_mib}), rows=lambda: rows, simulated=True)
    adapted = attach(load_base(experiment.model, experiment.task, "cpu"), experiment.peft, experiment.task)
    start, plan = adapted.initial(experiment.seed), client_plan(experiment, state)
    header = InstructionHeader(round=1, plan=plan, plan_digest=plan.digest, base_digest=adapted.base.digest,
        adapter_digest=digest(start))
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    reply = site.handle(Instruction(header, start))
    assert reply.header.status == "trained", reply.header.reason
    peak = megabytes("VmHWM") - before
    site.close()
    return peak, sum(tensor.numel() for tensor in start.values())


rank, mib = int(sys.argv[2]), int(sys.argv[3])
work(1, 512, None, "warm")
small, few = work(1, 512, None, "small")  # eight records of 64 tokens at once
large, many = work(rank, 4096, mib, "large")
unlimited, _ = work(rank, 4096, None, "unlimited")
print(json.dumps({"small": small, "large": large, "unlimited": unlimited, "few": few, "many": many}))
"""


@pytest.mark.parametrize("task", [CausalLM(), Classification(labels=("a", "b", "c"))], ids=["text", "labels"])
def test_the_rank_is_the_largest_that_fits(task: CausalLM | Classification) -> None:
    base = load_base(Model(path=BASE), task, "cpu")

    def needed(rank: int) -> int:
        adapted = attach(base, LoRA(rank=rank), task)
        return training_bytes(sum(each.numel() for each in adapted.parameters.values()), LEAST_EXAMPLES)

    for rank in (1, 7, 32):
        assert rank_that_fits(BASE, task, needed(rank)) == rank
        assert rank_that_fits(BASE, task, needed(rank + 1) - 1) == rank
        assert rank_that_fits(BASE, task, needed(rank) - 1) == rank - 1
    assert rank_that_fits(BASE, task, 0) == 0
    assert rank_that_fits(BASE, task, 1 << 50) == 1024


def test_examples_fill_what_the_adapter_leaves() -> None:
    for examples in (0, 1, 8, 33):
        assert examples_that_fit(1000, 1000, training_bytes(1000, examples)) == examples
        assert examples_that_fit(1000, 1000, training_bytes(1000, examples + 1) - 1) == examples
    assert examples_that_fit(1000, 250, training_bytes(1000, 8)) == 32, "an example's gradient is of what is trained"
    assert examples_that_fit(1000, 1000, 0) == 0


def test_a_base_that_is_not_there_cannot_be_planned_for(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError, match=r"memory_mib needs the sizes of the layers.*set trained_rank instead"):
        rank_that_fits(str(tmp_path), CausalLM(), 1 << 30)


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
@pytest.mark.rare
def test_training_takes_about_what_the_formula_says(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Peak resident memory of a real private round with AdamW above that of rank 1, whose activations are the same:
    sixty-four records are drawn and eight fit. Without the bound it takes more than was planned."""
    rank = 64
    memory = training_bytes(_values(rank), LEAST_EXAMPLES)
    mib = -(-memory // (1 << 20))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path), str(rank), str(mib)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    taken, planned = (found["large"] - found["small"]) * 2**20, memory - training_bytes(found["few"], LEAST_EXAMPLES)
    assert found["many"] == _values(rank)
    assert 0.1 * planned < taken < 1.25 * planned
    assert (found["unlimited"] - found["small"]) * 2**20 > 1.25 * planned


def _values(rank: int) -> int:
    adapted = attach(load_base(Model(path=BASE), CausalLM(), "cpu"), LoRA(rank=rank), CausalLM())
    return sum(each.numel() for each in adapted.parameters.values())
