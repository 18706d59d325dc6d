"""What a server asks of a site, and what a site answers.

Headers are JSON, decoded strictly: an unknown key, a wrong type or another schema version is refused. Tensors travel
beside the header (`protocol/records.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from conf.schema.base import Frozen
from conf.schema.experiment import Experiment
from conf.schema.federation import LocalTraining
from conf.schema.model import LoRA, Model
from conf.schema.privacy import ClientLevel, Privacy
from conf.schema.strategy import Strategy
from conf.schema.task import Task
from conf.schema.wire import NoQuantization, Quantization
from protocol.errors import ReplyRejected, SiteRefusal
from protocol.tensors import NamedTensors

__all__ = [
    "WIRE_VERSION",
    "ClientPlan",
    "Instruction",
    "InstructionHeader",
    "LedgerName",
    "PrivacyStatement",
    "ReleaseClaim",
    "Reply",
    "ReplyHeader",
    "client_plan",
    "decode_instruction",
    "decode_reply",
]

WIRE_VERSION = 1
"""Raised when a message of an older version can no longer be read; both ends compare it first."""


LedgerName = Literal["records", "site"]
"""Which of a site's ledgers: of its records or users, or of itself as one unit."""
_Head = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ClientPlan(Frozen):
    """The client half of an experiment: no data, no population, nothing about where the server runs.

    A site compares the base by digest and never follows the name in `model.path`.
    """

    wire_version: Literal[1] = WIRE_VERSION
    run: str = Field(min_length=1, max_length=128)
    rounds: int = Field(ge=1, le=100_000)
    adapter_seed: int = Field(ge=0, description="of the initial adapter; public, and the same at every site")
    strategy: Strategy
    privacy: Privacy
    model: Model
    peft: LoRA
    task: Task
    local: LocalTraining
    quantization: Quantization = NoQuantization()

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def client_plan(experiment: Experiment, run: str) -> ClientPlan:
    """Return what sites need to know of an experiment."""
    return ClientPlan(
        run=run,
        rounds=experiment.federation.rounds,
        adapter_seed=experiment.seed,
        strategy=experiment.strategy,
        privacy=experiment.privacy,
        model=experiment.model,
        peft=experiment.peft,
        task=experiment.task,
        local=experiment.federation.local,
        quantization=experiment.quantization,
    )


class ReleaseClaim(Frozen):
    """What a server says it will do to the sum of clipped updates, in every round of a client-level run.

    A site cannot verify it. It compares it with what the plan asks for, and books it.
    """

    noise_multiplier: float = Field(gt=0, description="of all that a round releases; of the whole run if correlated")
    sampling_rate: float = Field(gt=0, le=1, description="1 unless cohorts are drawn in secret")
    delta: float = Field(gt=0, lt=1)
    min_separation: int | None = Field(default=None, ge=1, description="correlated noise only, as the next one")
    max_participations: int | None = Field(default=None, ge=1)


class InstructionHeader(Frozen):
    """One round's work. The digests are compared by the site before anything is spent."""

    round: int = Field(ge=1)
    plan: ClientPlan
    plan_digest: str
    base_digest: str
    adapter_digest: str = Field(description="of the whole adapter, also of tensors that the site derives itself")
    clip_norm: float | None = Field(default=None, gt=0, description="client-level: L2 bound on this round's update")
    reference_digest: str | None = Field(
        default=None, description="of tensors the site received before; what is sent is their encoded change"
    )
    unused_rounds: tuple[int, ...] = Field(
        default=(), description="earlier rounds of this run whose update from this site came too late or was rejected"
    )

    release: ReleaseClaim | None = Field(default=None, description="client-level: how the server noises the sum")
    ledger_heads: dict[LedgerName, _Head] = Field(
        default_factory=dict,
        description="where this site's ledgers ended when it last answered this server; a ledger that lacks the entry "
        "was set back",
    )

    @model_validator(mode="after")
    def _client_level_clips(self) -> InstructionHeader:
        if isinstance(self.plan.privacy, ClientLevel) != (self.clip_norm is not None):
            raise ValueError("clip_norm belongs to client-level privacy, and to nothing else")
        privacy = self.plan.privacy
        if (
            isinstance(privacy, ClientLevel)
            and privacy.clipping.kind == "fixed"
            and self.clip_norm != privacy.clip_norm
        ):
            raise ValueError(f"clip_norm={self.clip_norm} is not the plan's, {privacy.clip_norm}, which is fixed")
        return self


@dataclass(frozen=True)
class Instruction:
    """A header, and the adapter tensors that a site cannot derive itself."""

    header: InstructionHeader
    tensors: NamedTensors


class PrivacyStatement(Frozen):
    """What a site's protection costs so far. Numbers follow from what was asked of the site, not from records."""

    unit: str
    relation: str
    epsilon_run: float = Field(ge=0, default=0, description="of this run, all executed rounds")
    epsilon_total: float = Field(default=0, ge=0, description="of everything the ledger holds")
    epsilon_budget: float | None = Field(default=None, ge=0)
    delta: float | None = None
    accountant: str = "none"
    noise_multiplier: float = Field(default=0, ge=0)
    clip_norm: float | None = None
    sampling_rate: float = Field(ge=0, le=1)
    steps_executed: int = Field(ge=0)
    mechanism: dict[str, Any] | None = Field(
        default=None,
        description="the latest round's parameters with all booked steps, as an accountant reads it "
        "(privacy/mechanisms.py): public constants",
    )
    mechanisms: tuple[dict[str, Any], ...] = Field(
        default=(), description="what the ledger booked for this run, whatever it was; with each one's steps"
    )
    insecure_seed: bool = False


class ReplyHeader(Frozen):
    """A site's answer: trained, or refused with a reason code. Metrics are those the site's policy releases."""

    status: Literal["trained", "refused"]
    site: str
    round: int
    plan_digest: str
    base_digest: str = ""
    adapter_digest: str = Field(default="", description="of the adapter that the update starts from")
    steps: int = Field(default=0, ge=0, description="optimizer steps taken: asked for, or fewer by the site's own file")
    privacy: PrivacyStatement | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    ledger_heads: dict[LedgerName, _Head] = Field(
        default_factory=dict, description="the hash of the last entry of each ledger in which this round is booked"
    )
    below_clip: bool | None = Field(default=None, description="adaptive clipping: whether the clip changed nothing")
    code: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Reply:
    """A header, and the update: trained minus received, for the tensors that the strategy trains, as encoded."""

    header: ReplyHeader
    tensors: NamedTensors = field(default_factory=dict)


def decode_instruction(header: str, tensors: NamedTensors) -> Instruction:
    """Return the instruction that a message holds.

    Raises:
        SiteRefusal: code `malformed_instruction` when it does not decode, `plan_digest` when the plan was altered.
    """
    try:
        decoded = InstructionHeader.model_validate_json(header, strict=True)
    except ValidationError as error:
        raise SiteRefusal("malformed_instruction", f"the instruction cannot be read: {_first(error)}") from error
    if decoded.plan.digest != decoded.plan_digest:
        raise SiteRefusal("plan_digest", "the plan does not match its digest; server and site differ in version")
    return Instruction(decoded, tensors)


def decode_reply(header: str, tensors: NamedTensors) -> Reply:
    """Return the reply that a message holds.

    Raises:
        ReplyRejected: code `malformed_reply` when it does not decode.
    """
    try:
        return Reply(ReplyHeader.model_validate_json(header, strict=True), tensors)
    except ValidationError as error:
        raise ReplyRejected("malformed_reply", f"the reply cannot be read: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'document'}: {problem['msg']}"
