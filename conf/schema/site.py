"""A site's own file: its data, its budget, and what it allows. No server can change it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conf.schema.base import Frozen
from conf.schema.data import DataConfig
from conf.schema.task import CausalLM, Task

__all__ = ["SiteBudget", "SiteFile", "SitePolicy", "SiteRuntime", "WholeSiteBudget"]


class SiteBudget(Frozen):
    """The most one unit of this site may ever cost, over all runs."""

    unit: Literal["record", "user"] = Field(
        default="record", description="what is counted; a plan that protects another unit is refused"
    )
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class WholeSiteBudget(Frozen):
    """The most this whole site may ever cost in client-level runs, by what their servers say of their noise."""

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class SitePolicy(Frozen):
    """What this site agrees to. The defaults agree to private training and release nothing else."""

    allow_no_privacy: bool = Field(default=False, description="take part in runs that protect nothing")
    release_training_loss: bool = Field(
        default=False, description="send the local training loss in runs that protect nothing"
    )
    trust_server_noise: bool = Field(
        default=False,
        description="take part in client-level runs without protection of its own: the server sees this site's clipped "
        "update and is trusted to add the noise",
    )
    max_steps_per_round: int = Field(default=1000, ge=1)


class SiteRuntime(Frozen):
    """How this site computes; the guarantee holds whatever it says."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    micro_batch_tokens: int = Field(default=8192, ge=1)
    steps_per_round: int | None = Field(
        default=None,
        ge=1,
        description="the most optimizer steps in a round, for a slow site; public, and its privacy is planned for them",
    )
    static_shapes: bool = Field(
        default=False,
        description="pad every micro-batch to one shape (for compiled or GPU training); changes no number",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass instead of keeping them: less memory, about a third "
        "more time; changes no number",
    )


class SiteFile(Frozen):
    """Everything a site needs to answer instructions."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    published_records: int = Field(
        ge=1,
        description="a record count the site makes public (rounded, say): the sampling rate follows from it. The true "
        "count stays a secret",
    )
    published_users: int | None = Field(
        default=None,
        ge=1,
        description="the same for users (data.user_column); null: this site takes no part in user-level runs",
    )
    data: DataConfig
    budget: SiteBudget | None = Field(default=None, description="null: this site can only take part without privacy")
    site_budget: WholeSiteBudget | None = Field(
        default=None,
        description="booked before training in client-level runs, in site_ledger.db of the state directory; null: this "
        "site books nothing for itself as a whole, and policy.trust_server_noise alone decides",
    )
    policy: SitePolicy = SitePolicy()
    runtime: SiteRuntime = SiteRuntime()
    model_path: str = Field(
        min_length=1,
        description="this site's own copy of the base; what a plan calls it is not looked at, its digest is compared",
    )
    task: Task = Field(
        default=CausalLM(), description="the only task this site trains: a plan that chose labels could test for them"
    )
    ledger: str | None = Field(
        default=None,
        description="SQLAlchemy URL of the ledger, e.g. postgresql+psycopg://...; null: ledger.db in state_directory",
    )
    state_directory: str = Field(min_length=1, description="where the ledger and the private diagnostics are kept")
