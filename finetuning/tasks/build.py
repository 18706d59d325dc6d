"""From a task's configuration to its objective."""

from __future__ import annotations

from collections.abc import Callable

from conf.schema import task as schema
from finetuning.tasks.base import TaskObjective
from finetuning.tasks.causal_lm import CausalLMObjective
from finetuning.tasks.classification import ClassificationObjective

__all__ = ["OBJECTIVES", "build_objective"]

OBJECTIVES: dict[type[schema.CausalLM | schema.Classification], Callable[[], TaskObjective]] = {
    schema.CausalLM: CausalLMObjective,
    schema.Classification: ClassificationObjective,
}


def build_objective(task: schema.Task) -> TaskObjective:
    """Return the objective that a validated configuration names."""
    return OBJECTIVES[type(task)]()
