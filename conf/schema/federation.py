"""How many rounds, who takes part, and what a site does in one round."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from conf.schema.base import Frozen

__all__ = [
    "SGD",
    "AdamW",
    "Buffered",
    "Federation",
    "LocalTraining",
    "Mode",
    "Optimizer",
    "ServerBudget",
    "Synchronous",
]


class _Optimizer(Frozen):
    weight_decay: float = Field(default=0.0, ge=0, le=1e3, description="a step takes learning_rate x this off a value")

    @model_validator(mode="after")
    def _decay_shrinks(self) -> Self:
        """A step multiplies a value by 1 - learning_rate x weight_decay: below 0 it turns over, below -1 it grows."""
        rate: float = getattr(self, "learning_rate", 0.0)
        if rate * self.weight_decay > 1:
            raise ValueError(
                f"learning_rate={rate:g} x weight_decay={self.weight_decay:g} must be at most 1, or a step takes more "
                f"off a value than there is; use a weight_decay of at most {1 / rate:.3g}"
            )
        return self


class SGD(_Optimizer):
    """Plain or heavy-ball SGD on the (noised) gradient."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: float = Field(default=1.0, ge=1e-12, le=1e4)
    momentum: float = Field(default=0.0, ge=0, le=0.9999)


class AdamW(_Optimizer):
    """AdamW on the (noised) gradient; its state lives for one round."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=5e-3, ge=1e-12, le=1e2)
    beta1: float = Field(default=0.9, ge=0, le=0.9999)
    beta2: float = Field(default=0.99, ge=0, le=0.999999)


Optimizer = Annotated[SGD | AdamW, Field(discriminator="kind")]


class LocalTraining(Frozen):
    """One site's work in one round. All numbers are public constants."""

    steps: int = Field(default=4, ge=1, le=10_000, description="optimizer steps per round")
    expected_batch_size: float = Field(
        default=64,
        ge=1,
        le=1e9,
        description="a record is drawn with probability expected_batch_size / published record count, and every sum of "
        "gradients is divided by expected_batch_size, whatever was drawn; a site that publishes fewer than "
        "expected_batch_size / largest_rate records draws and divides by largest_rate x its count",
    )
    largest_rate: float = Field(
        default=1.0, gt=0, le=1, description="no site draws a record with a larger probability than this"
    )
    optimizer: Optimizer = SGD()
    learning_rate_decay: Literal["none", "linear"] = Field(
        default="none",
        description="linear: round t of T trains at (T - t + 1) / T of the learning rate; late noise moves less",
    )

    def expected_batch(self, published: int) -> float:
        """Return how many units a site that publishes a count of `published` expects to draw, and divides sums by."""
        return min(self.expected_batch_size, self.largest_rate * published)

    def learning_rate_factor(self, round_number: int, rounds: int) -> float:
        """Return what multiplies the learning rate in a round (from 1)."""
        return 1.0 if self.learning_rate_decay == "none" else (rounds - round_number + 1) / rounds


class Synchronous(Frozen):
    """A round ends when its whole cohort has answered."""

    kind: Literal["synchronous"] = "synchronous"


class Buffered(Frozen):
    """A round ends when enough sites have answered, whenever they were asked (FedBuff, arXiv 2106.06639)."""

    kind: Literal["buffered"] = "buffered"
    buffer_size: int = Field(default=2, ge=1, le=1_000_000, description="valid replies that make a round")
    max_staleness: int = Field(
        default=10,
        ge=0,
        le=100_000,
        description="rounds that may have ended since a site was asked; later replies are not used",
    )


Mode = Annotated[Synchronous | Buffered, Field(discriminator="kind")]


class ServerBudget(Frozen):
    """The most that client-level runs may ever cost one site, over all runs that the server's ledger holds."""

    epsilon: float = Field(ge=1e-6, le=1e6)
    delta: float = Field(gt=0, lt=1)


class Federation(Frozen):
    """Rounds, cohort and quorum."""

    rounds: int = Field(default=8, ge=1, le=100_000)
    mode: Mode = Synchronous()
    cohort_size: int | None = Field(
        default=None, ge=1, le=1_000_000, description="sites drawn per round; null: all of them"
    )
    cohort_sampling: Literal["fixed_size", "poisson"] = Field(
        default="fixed_size",
        description="fixed_size: exactly cohort_size sites, which may be known; poisson: each site with the same "
        "probability, cohort_size expected, in secret, which amplifies client-level privacy for whoever sees adapters",
    )
    min_replies: int = Field(
        default=1, ge=1, le=1_000_000, description="valid replies a round needs; below it the run fails"
    )
    reply_timeout_s: float = Field(default=3600.0, gt=0, le=1e8, description="how long a round waits for replies")
    expected_sites: int = Field(
        default=1, ge=1, le=1_000_000, description="sites that must be connected before round 1"
    )
    site_keys: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(
        default_factory=dict,
        description="by site: the Ed25519 public key that `cloister site check` prints there. Under a name that is "
        "listed only who holds that key takes part; others are believed their name as they come",
    )
    release_training_loss: bool = Field(
        default=False,
        description="simulated sites only, and only with privacy=none: send the local training loss (real sites decide "
        "in their own site file). Under privacy use privacy.loss_noise_multiplier",
    )
    site_ranks: tuple[Annotated[int, Field(ge=1, le=1024)], ...] | None = Field(
        default=None,
        min_length=1,
        description="most LoRA rank of each simulated site, in the order of their names, from the start again when the "
        "list ends; null: peft.rank. Real sites set trained_rank",
    )
    site_epsilon: float | None = Field(
        default=None,
        ge=1e-6,
        le=1e6,
        description="budget of each simulated site; null: what this run or sweep needs. Real sites set their own",
    )
    server_budget: ServerBudget | None = Field(
        default=None,
        description="what client-level runs may cost one site, over all runs in the server's ledger; null: what the "
        "first of them promises",
    )
    server_ledger: str | None = Field(
        default=None,
        min_length=1,
        description="folder of the server's ledger and keys; null: server/ under CLOISTER_HOME in a deployment, in a "
        "simulation in the run directory, in a sweep in the sweep's",
    )
    sites_per_person: int = Field(
        default=1,
        ge=1,
        le=1_000_000,
        description="sites at which one person may be known: every report states ε for that many beside ε for one",
    )
    local: LocalTraining = LocalTraining()
