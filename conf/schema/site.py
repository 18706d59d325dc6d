"""A site's own file: its data, its budget, and what it allows. No server can change it."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator, model_validator

from conf.schema.base import Frozen
from conf.schema.data import DataConfig
from conf.schema.model import Dtype
from conf.schema.paths import LocalPath
from conf.schema.task import CausalLM, Task

__all__ = [
    "SiteBudget",
    "SiteFile",
    "SiteNode",
    "SitePolicy",
    "SiteRuntime",
    "SiteServe",
    "WholeSiteBudget",
    "WorkingHours",
]

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Expiring(Frozen):
    expires: date | None = Field(default=None, description="the last day (UTC) on which it may be spent; null: no end")

    def expired(self, now: datetime) -> bool:
        """Return whether nothing of it may be spent any more; `now` is aware of its time zone."""
        return self.expires is not None and now.astimezone(ZoneInfo("UTC")).date() > self.expires


class SiteBudget(_Expiring):
    """The most one unit of this site's data set may ever cost, over all runs."""

    unit: Literal["record", "user"] = Field(
        default="record", description="what is counted; a plan that protects another unit is refused"
    )
    epsilon: float = Field(ge=1e-6, le=1e6)
    delta: float = Field(gt=0, lt=1)


class WorkingHours(Frozen):
    """When this site takes instructions. A window that ends before it starts runs past midnight."""

    timezone: str = Field(default="UTC", description="of the IANA database, such as Europe/Berlin")
    days: tuple[Day, ...] = Field(default=_DAYS, min_length=1, description="on which a window starts")
    start: time = Field(description='"20:00", in quotes')
    end: time = Field(description='"06:00", in quotes; the same as start: all day')

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (OSError, KeyError, ValueError) as error:  # a KeyError when there is none
            raise ValueError(
                f"{name!r} is no time zone of the IANA database; use a name such as Europe/Berlin"
            ) from error
        return name

    @field_validator("start", "end", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            raise ValueError('YAML reads 18:00 as a number; write it in quotes: "18:00"')
        return value

    def cover(self, now: datetime) -> bool:
        """Return whether a moment lies in a window; `now` is aware of its time zone."""
        local = now.astimezone(ZoneInfo(self.timezone))
        today, yesterday = (_DAYS[(local - timedelta(days=back)).weekday()] in self.days for back in (0, 1))
        clock = local.time()
        if self.start < self.end:
            return today and self.start <= clock < self.end
        return (today and clock >= self.start) or (yesterday and clock < self.end)


class WholeSiteBudget(_Expiring):
    """The most this whole site may ever cost in client-level runs, by what their servers say of their noise."""

    epsilon: float = Field(ge=1e-6, le=1e6)
    delta: float = Field(gt=0, lt=1)


class SitePolicy(Frozen):
    """What this site agrees to. The defaults agree to approved, private training and release nothing else.

    The stricter of policy and plan holds: what a plan asks beyond a line is refused, never adjusted.
    """

    require_approval: bool = Field(
        default=True,
        description="somebody must run `cloister site approve DIGEST` before the first round of each new experiment",
    )
    privacy_modes: tuple[Literal["example_level", "user_level"], ...] = Field(
        default=("example_level", "user_level"), description="what a plan may have this site enforce itself"
    )
    allow_no_privacy: bool = Field(default=False, description="take part in runs that protect nothing")
    trust_server_noise: bool = Field(
        default=False,
        description="take part in client-level runs without protection of its own: the server sees this site's clipped "
        "update and is trusted to add the noise",
    )
    min_noise_multiplier: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="noise std over clip norm, at least: this site's, or, where it adds none, what the server claims",
    )
    max_clip_norm: float = Field(default=1e6, ge=1e-6, le=1e6)
    max_epsilon_per_run: float | None = Field(
        default=None, ge=1e-6, le=1e6, description="at the budget's δ; null: the budget"
    )
    max_epsilon_per_round: float | None = Field(
        default=None, ge=1e-6, le=1e6, description="at the budget's δ; null: the budget"
    )
    release_noisy_loss: bool = Field(
        default=True, description="allow plans that release the mean training loss with noise, charged to the budget"
    )
    release_training_loss: bool = Field(
        default=False, description="send the local training loss in runs that protect nothing"
    )
    bases: tuple[Digest, ...] | None = Field(
        default=None, description="SHA-256 digests of allowed bases; null: the one at model_path, and no other"
    )
    dtypes: tuple[Dtype, ...] = Field(
        default=("fp32", "bf16"),
        description="how the base may be held and compute. A record's influence is bounded in each alike; fp16 "
        "overflows above 65,504, and a record whose gradient does adds nothing",
    )
    strategies: tuple[str, ...] | None = Field(default=None, description="such as fedit; null: any")
    objectives: tuple[str, ...] | None = Field(
        default=None, description="what is minimized, besides the plain loss (none), such as fedprox; null: any"
    )
    server_optimizers: tuple[str, ...] | None = Field(
        default=None,
        description="how the server steps, besides none. It comes after the noise, and the server's word is all there "
        "is for it; null: any",
    )
    robust_rules: tuple[str, ...] | None = Field(
        default=None, description="how the server combines, besides none; its word, as above; null: any"
    )
    quantization: tuple[str, ...] | None = Field(
        default=None, description="codecs an update may leave in, besides plain float32 (none); null: any"
    )
    max_rounds: int = Field(default=1000, ge=1, le=100_000)
    max_steps_per_round: int = Field(default=1000, ge=1, le=10_000)
    max_rank: int = Field(
        default=256, ge=1, le=1024, description="of LoRA; bounds memory, time and the size of an update"
    )
    hours: WorkingHours | None = Field(default=None, description="null: at any time")


class SiteRuntime(Frozen):
    """How this site computes; the guarantee holds whatever it says."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=4096)
    micro_batch_tokens: int = Field(default=8192, ge=1, le=1 << 30)
    steps_per_round: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
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


class SiteServe(Frozen):
    """The site's own process, `cloister site serve`."""

    socket: LocalPath | None = Field(
        default=None, description="where it listens; null: run/site.sock in state_directory. In a folder of its own"
    )
    listen: Literal["auto", "unix", "tcp"] = Field(
        default="auto",
        description="tcp: a loopback port and a token, both in a file in place of the socket; auto: tcp where there "
        "are no Unix sockets",
    )
    max_message_mib: int = Field(default=512, ge=1, le=16384, description="of one instruction, unpacked")
    stop_grace_s: float = Field(default=30.0, ge=0, le=1e8, description="how long a stop waits for a round under way")
    min_free_mib: int = Field(
        default=64, ge=0, le=1 << 30, description="of state_directory's disk; below it nothing is started"
    )
    keep_replies: int = Field(
        default=64, ge=0, le=1_000_000, description="the latest, to repeat an answer that was lost on its way"
    )
    keep_replies_days: float = Field(default=30.0, gt=0, le=36_500)


class SiteNode(Frozen):
    """The Flower SuperNode of this site, `cloister site start`. Relative paths start where the command is given."""

    superlink: str = Field(pattern=r"^[^\s/:]+:[0-9]{1,5}$", description="the federation's server, HOST:PORT")
    root_certificates: LocalPath | None = Field(
        default=None, description="PEM file of the server's CA; null: the system's"
    )
    insecure: bool = Field(default=False, description="no TLS: for trials on one machine")
    private_key: LocalPath | None = Field(default=None, description="of node authentication, a NIST curve")
    user: str | None = Field(default=None, description="run the SuperNode as this operating-system user; needs root")
    port: int = Field(default=9094, ge=1, le=65535, description="loopback port between the SuperNode's own processes")


class SiteFile(Frozen):
    """Everything a site needs to answer instructions."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    published_records: int = Field(
        ge=1,
        le=1 << 40,
        description="a record count the site makes public (rounded, say): the sampling rate follows from it. The true "
        "count stays a secret",
    )
    published_users: int | None = Field(
        default=None,
        ge=1,
        le=1 << 40,
        description="the same for users (data.user_column); null: this site takes no part in user-level runs",
    )
    data: DataConfig
    budget: SiteBudget | None = Field(default=None, description="null: this site can only take part without privacy")
    site_budget: WholeSiteBudget | None = Field(
        default=None,
        description="booked before training in client-level runs, in site_ledger.db of the state directory; null: this "
        "site books nothing for itself as a whole, and policy.trust_server_noise alone decides",
    )
    policy: SitePolicy | None = Field(default=None, description="null: nothing is allowed")
    runtime: SiteRuntime = SiteRuntime()
    model_path: LocalPath = Field(
        min_length=1,
        description="this site's own copy of the base; what a plan calls it is not looked at, its digest is compared",
    )
    task: Task = Field(
        default=CausalLM(), description="the only task this site trains: a plan that chose labels could test for them"
    )
    trained_rank: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="the most LoRA rank this site trains; of a larger adapter it gets a cut, where the strategy "
        "can combine ranks; what is refused outright is policy.max_rank. null: "
        "whatever a plan asks. The server is told",
    )
    memory_mib: int | None = Field(
        default=None,
        ge=1,
        le=1 << 30,
        description="memory for the adapter and its training, beside the base and its activations (which "
        "runtime.micro_batch_tokens bounds): the largest rank that fits (finetuning/memory.py), or trained_rank where "
        "that is less, is what this site trains and the server is told. The records of one user are held at once, up "
        "to privacy.max_records_per_user, also where they are too many. null: not limited",
    )
    ledger: LocalPath | None = Field(
        default=None,
        description="SQLAlchemy URL of the ledger, e.g. postgresql+psycopg://...; null: ledger.db in state_directory",
    )
    state_directory: LocalPath = Field(
        min_length=1, description="where keys, ledger, replies, approvals and the private diagnostics are kept"
    )
    serve: SiteServe = SiteServe()
    node: SiteNode | None = Field(default=None, description="null: `cloister site start` has nothing to start")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _every_record_counts_alone(self) -> Self:
        if self.data.max_records is not None:
            raise ValueError(
                f"data.max_records={self.data.max_records} must be null at a site: which records are drawn depends on "
                "all of them, so one record more or less would change many of those used, and the ε would not hold; "
                "write the records to train on to a file of their own"
            )
        return self

    @model_validator(mode="after")
    def _another_user_reaches_the_socket(self) -> Self:
        if self.node is not None and self.node.user is not None and self.serve.socket is None:
            raise ValueError(
                f"node.user={self.node.user} cannot enter state_directory, where the socket is by default; set "
                "serve.socket, such as /run/cloister/site.sock"
            )
        return self
