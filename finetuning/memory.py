"""How much memory training an adapter takes beside the base and its activations, and the rank that fits into some.

    bytes = 4 v (16 + 2 e)

for v trained values and e examples whose gradients are held at once: 4 bytes a value, and

=====================================================================================  =====
copies of the adapter                                                                  16
=====================================================================================  =====
parameters, what was received, the initial values, the trained ones                    4
the update, its encoding, the reply                                                    3
gradient, clipped sum, that of a micro-batch                                           3
noise of this step and of the next, drawn ahead, at 8 bytes                            4
AdamW's two moments                                                                    2
=====================================================================================  =====

An example's gradient is there once, and once more where the records of a user are summed. That is the most that a plan
can ask for at a rank: every linear layer, both factors, private, AdamW. So the rank that fits is known before any plan,
and tells nothing but what the site says of its memory. One user's records are held at once whatever fits, up to the
plan's `privacy.max_records_per_user`.
"""

from __future__ import annotations

from conf.schema.model import LoRA, Model
from conf.schema.strategy import FedIT
from conf.schema.task import Task
from finetuning.shapes import adapter_sizes
from protocol.errors import ModelError

__all__ = ["LEAST_EXAMPLES", "examples_that_fit", "rank_that_fits", "training_bytes"]

LEAST_EXAMPLES = 8
"""Examples at once that a rank is chosen for: with fewer, a step takes many short passes."""
_COPIES, _PER_EXAMPLE = 16, 2
_MOST_RANK = 1024


def training_bytes(values: int, examples: int) -> int:
    """Return what an adapter of `values` values takes while the gradients of `examples` examples are held."""
    return 4 * values * (_COPIES + _PER_EXAMPLE * examples)


def rank_that_fits(path: str, task: Task, memory: int) -> int:
    """Return the largest rank of LoRA on every linear layer that `memory` bytes hold; 0 where not even rank 1 fits.

    Raises:
        ModelError: there is no safetensors checkpoint at `path` to read the layers' sizes from.
    """

    peft = LoRA()
    sizes = adapter_sizes(Model(path=path), peft, task)
    if sizes is None:
        raise ModelError(
            f"memory_mib needs the sizes of the layers, and model_path={path} holds no safetensors checkpoint; set "
            "trained_rank instead"
        )
    # A plan of a higher rank leaves small layers out and may fit where this one does not; a lower one must fit too.
    for rank in range(1, _MOST_RANK + 1):
        if training_bytes(sizes.values(rank, peft, FedIT()), LEAST_EXAMPLES) > memory:
            return rank - 1
    return _MOST_RANK


def examples_that_fit(values: int, trained: int, memory: int) -> int:
    """Return how many examples' gradients fit beside an adapter; 0 where none does.

    Args:
        values: of the adapter.
        trained: how many of them are trained, and have a gradient per example.
        memory: bytes for both.
    """
    return max(0, (memory - training_bytes(values, 0)) // (4 * _PER_EXAMPLE * trained))
