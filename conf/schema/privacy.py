"""What is protected, and at what price."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from conf.schema.base import Frozen

__all__ = [
    "AdaptiveClip",
    "Banded",
    "Blt",
    "ClientLevel",
    "ExampleLevel",
    "FixedClip",
    "IndependentNoise",
    "LocalPrivacy",
    "NoPrivacy",
    "Privacy",
    "Tree",
    "UserLevel",
    "adaptive_clipping",
    "local_privacy",
]


class NoPrivacy(Frozen):
    """No protection: for comparison only. Every report says so."""

    kind: Literal["none"] = "none"


class _Budgeted(Frozen):
    """A promise, given by its price or by its noise: exactly one of `target_epsilon` and `noise_multiplier`."""

    target_epsilon: float | None = Field(default=None, ge=1e-6, le=100, description="ε for all rounds together")
    noise_multiplier: float | None = Field(
        default=None, ge=0.2, le=1000, description="noise std over clip norm; below 0.2 no ε is worth its name"
    )
    delta: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="null: 1 / (10 x the published count of protected units); 1/count or more is refused",
    )
    insecure_seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="makes noise and sampling repeatable, and so guessable: simulation only, printed on every report",
    )


class _DPSGD(_Budgeted):
    """DP-SGD on the adapter, inside each site."""

    clip_norm: float = Field(
        default=1.0, ge=1e-6, le=1e6, description="L2 bound on one unit's gradient, over all trained tensors"
    )
    batch_cap: float | None = Field(
        default=3.0,
        ge=1.0,
        le=100.0,
        description="a larger draw is cut to batch_cap x the expected batch, at random, which bounds memory and is "
        "accounted (arXiv 2508.15089); null: no cap",
    )
    per_example_gradients: Literal["native", "opacus", "one_by_one"] = Field(
        default="native",
        description="native: rules for LoRA, DoRA, norms, embeddings and heads, also under gradient checkpointing; "
        "opacus: its hooks; one_by_one: exact for every architecture, slower on a GPU",
    )
    without_rule: Literal["one_by_one", "refuse"] = Field(
        default="one_by_one",
        description="when a trained layer has no per-example rule: train example by example (with a warning that names "
        "it), or refuse",
    )
    noise: Literal["gaussian", "discrete"] = Field(
        default="gaussian",
        description="gaussian: float64, rounded to a lattice; discrete: sums of integers with discrete Gaussian noise "
        "(arXiv 2004.00010), accounted by Rényi DP",
    )
    loss_noise_multiplier: float | None = Field(
        default=None,
        ge=0.2,
        le=1000,
        description="release the round's mean training loss with this noise, which is charged; null: not released",
    )
    loss_clip: float = Field(default=10.0, ge=1e-6, le=1e4, description="bound on one unit's loss in the released mean")


class ExampleLevel(_DPSGD):
    """The unit is one record of a site: filling or emptying its slot changes what leaves by a bounded amount (ε, δ)."""

    kind: Literal["example_level"] = "example_level"


class UserLevel(_DPSGD):
    """The unit is one user of a site: all records that name one person in the site's `data.user_column`."""

    kind: Literal["user_level"] = "user_level"
    max_records_per_user: int = Field(
        default=16, ge=1, le=1_000_000, description="a user's further records are left out, chosen by a keyed hash"
    )
    user_gradient: Literal["mean", "sum"] = Field(
        default="mean", description="how a user's gradients become one, before it is clipped"
    )


LocalPrivacy = Annotated[NoPrivacy | ExampleLevel | UserLevel, Field(discriminator="kind")]
"""What a site enforces itself."""


class FixedClip(Frozen):
    """The clip norm is a constant."""

    kind: Literal["fixed"] = "fixed"


class AdaptiveClip(Frozen):
    """The clip norm follows a quantile of the update norms (Andrew et al. 2021, arXiv 1905.03871).

    The count of updates below the norm is noised, and its cost is part of the same ε.
    """

    kind: Literal["adaptive"] = "adaptive"
    quantile: float = Field(
        default=0.5, ge=1e-6, le=1 - 1e-6, description="fraction of updates that should not be clipped"
    )
    learning_rate: float = Field(default=0.2, ge=1e-6, le=2, description="of the geometric update")
    count_noise: float = Field(
        default=1.0, ge=1e-3, le=1e6, description="std of the noise on the count of unclipped updates"
    )


class IndependentNoise(Frozen):
    """Fresh Gaussian noise in every round."""

    kind: Literal["independent"] = "independent"


class _Correlated(Frozen):
    """Noise correlated over rounds (DP-FTRL): no assumption on how cohorts are sampled, but participation is limited.

    The limits are enforced: a site that took part too recently, or too often, is not asked.
    """

    min_separation: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="rounds from one participation of a site to its next; null: the most that asking the sites in "
        "rotation gives, sites // cohort_size",
    )
    max_participations: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="rounds a site may take part in, over the whole run; null: the least that rotation gives",
    )


class Tree(_Correlated):
    """Binary-tree aggregation (Kairouz et al. 2021, arXiv 2103.00039)."""

    kind: Literal["tree"] = "tree"


class Banded(_Correlated):
    """Banded matrix factorization (Choquette-Choo et al. 2023, arXiv 2306.08153)."""

    kind: Literal["banded"] = "banded"
    bands: int | None = Field(default=None, ge=1, le=100_000, description="at most min_separation; null: as many")


class Blt(_Correlated):
    """Buffered linear Toeplitz noise (Dvijotham et al. 2024, arXiv 2404.16706)."""

    kind: Literal["blt"] = "blt"
    buffers: int = Field(default=3, ge=1, le=8)


Clipping = Annotated[FixedClip | AdaptiveClip, Field(discriminator="kind")]
CohortNoise = Annotated[IndependentNoise | Tree | Banded | Blt, Field(discriminator="kind")]


class ClientLevel(_Budgeted):
    """The unit is a whole site: its update is clipped at the site, and the server adds noise to the sum.

    The server is trusted to add the noise and sees each update; the promise holds for whoever sees the adapters.
    """

    kind: Literal["client_level"] = "client_level"
    clip_norm: float = Field(default=1.0, ge=1e-6, le=1e6, description="L2 bound on one site's update; where it starts")
    clipping: Clipping = FixedClip()
    noise: CohortNoise = IndependentNoise()
    max_weight: float = Field(
        default=2.0,
        ge=1,
        le=1e6,
        description="with strategy.weights=published_records a site weighs its count over the mean count, at most "
        "this; the noise grows with the largest weight",
    )
    local: LocalPrivacy = Field(default=NoPrivacy(), description="what each site enforces besides, for its own units")

    @model_validator(mode="after")
    def _nothing_of_a_site_beside_its_update(self) -> Self:
        if not isinstance(self.local, NoPrivacy) and self.local.loss_noise_multiplier is not None:
            raise ValueError(
                f"local.loss_noise_multiplier={self.local.loss_noise_multiplier:g} must be null under client_level: a "
                "site's mean loss is noised for one of its records, and the promise here is for the whole site"
            )
        return self


Privacy = Annotated[NoPrivacy | ExampleLevel | UserLevel | ClientLevel, Field(discriminator="kind")]


def local_privacy(privacy: Privacy) -> LocalPrivacy:
    """Return what each site enforces itself under a plan."""
    return privacy.local if isinstance(privacy, ClientLevel) else privacy


def adaptive_clipping(privacy: Privacy) -> bool:
    """Return whether sites are to say if their update was below the clip norm."""
    return isinstance(privacy, ClientLevel) and isinstance(privacy.clipping, AdaptiveClip)
