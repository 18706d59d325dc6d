"""The whole experiment: every group, validated together."""

import hashlib
import json
from typing import Literal

from pydantic import Field, model_validator

from conf.schema.base import Frozen
from conf.schema.data import DataConfig
from conf.schema.execution import Evaluation, Logging, Runtime
from conf.schema.federation import Federation
from conf.schema.model import LoRA, Model
from conf.schema.privacy import Privacy
from conf.schema.rules import broken_rules
from conf.schema.strategy import Strategy
from conf.schema.task import Task
from conf.schema.wire import NoQuantization, NoSecureAggregation, Quantization

__all__ = ["SCHEMA_VERSION", "Experiment"]

SCHEMA_VERSION = 1
"""Raised when a stored configuration of an older version can no longer be read."""


class Experiment(Frozen):
    """Everything needed to repeat a run. `digest` identifies it."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", description="used in the run directory's name")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of everything but privacy noise and sampling")
    strategy: Strategy
    privacy: Privacy
    secagg: NoSecureAggregation = NoSecureAggregation()
    quantization: Quantization = NoQuantization()
    model: Model
    peft: LoRA
    data: DataConfig
    task: Task
    federation: Federation
    runtime: Runtime
    evaluation: Evaluation
    logging: Logging

    @model_validator(mode="after")
    def _rules_hold(self) -> "Experiment":
        problems = broken_rules(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def canonical_json(self) -> str:
        """Return the experiment as JSON with sorted keys: the stored and transmitted form."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, indent=1)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON without `logging`, which cannot change a result."""
        stable = self.model_dump(mode="json", exclude={"logging"})
        return hashlib.sha256(json.dumps(stable, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
